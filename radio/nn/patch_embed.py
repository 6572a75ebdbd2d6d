"""Patch embeddings: the plain linear one, and a stem of small convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ConfigError

# Letters: B batch, T tokens, D width, H W grid.


class LinearStem(nn.Module):
    """One linear map per patch (ViT)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H*p, W*p] as patch tokens [B, T, D]."""
        out: Tensor = self.proj(images)
        return out.flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Convolutions whose strides multiply to the patch size, then a 1x1 convolution to the width.

    Small students need it: with a plain linear embedding they do not learn shapes within tens of thousands
    of samples. It uses group norm instead of batch norm, so that no result depends on which images share a
    batch or a rank.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        strides = _factor(patch)
        widths = [max(width >> (len(strides) - 1 - i), 32) for i in range(len(strides))]
        layers: list[nn.Module] = []
        in_channels = 3
        for stride, out_channels in zip(strides, widths, strict=True):
            kernel = stride + 1 + stride % 2  # odd, and one wider than the stride, so that patches overlap
            layers += [
                nn.Conv2d(
                    in_channels, out_channels, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False
                ),
                nn.GroupNorm(8, out_channels),
                nn.GELU(),
            ]
            in_channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(in_channels, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H*p, W*p] as patch tokens [B, T, D]."""
        out: Tensor = self.proj(self.layers(images))
        return out.flatten(2).transpose(1, 2)


def _factor(patch: int) -> list[int]:
    """Factor a patch size into primes, ascending: 12 -> 2, 2, 3.

    Raises:
        ConfigError: a factor above 7, or a patch of 1; such a stride would reduce too much in one layer.
    """
    factors, rest = [], patch
    for prime in (2, 3, 5, 7):
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
    if rest != 1 or patch == 1:
        raise ConfigError(
            f"a convolutional stem cannot make patches of {patch} px; use a product of 2, 3, 5 and 7"
        )
    return factors

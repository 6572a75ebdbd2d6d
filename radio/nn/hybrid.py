"""The parts of the hybrid students: convolutions, the neck, and attention in windows of changing side."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..ops import from_windows, to_windows
from .vit import MLP, NORM_EPS, Attention

# Letters: B batch, C channels, D width, H W grid, s window side, M windows of all images, h heads.

NeckKind = Literal["lateral", "stage-3"]

_HIDDEN = 512  # hidden width of the position MLP
_UNIT = 8.0  # distance in tokens that the logarithm maps to about 1


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        kernel: side of the kernel.
        stride: H and W are divided by it; they must be multiples of it.
        activation: a module class; None leaves it out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        activation: type[nn.Module] | None = nn.SiLU,
    ) -> None:
        super().__init__()
        padding = (kernel - stride + 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.activation = nn.Identity() if activation is None else activation()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H * stride, W * stride] to [B, out_channels, H, W]."""
        out: Tensor = self.activation(self.norm(self.conv(x)))
        return out

    def fold(self) -> None:
        """Fold the norm into the convolution, for inference; a second call changes nothing."""
        if isinstance(self.norm, _BatchNorm):
            assert not self.training, "only the running statistics can be folded"
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class StridedStem(nn.Sequential):
    """Two 3x3 convolutions with batch norm and ReLU: [B, 3, h, w] -> [B, width, h / s, w / s].

    s is the product of the strides. A stride above 2 takes a kernel of 2 * stride - 1, so that neighbouring
    kernels still overlap.
    """

    def __init__(self, width: int, inner: int = 64, strides: tuple[int, int] = (2, 2)) -> None:
        layers = [
            ConvNorm(in_channels, out_channels, max(3, 2 * stride - 1), stride, nn.ReLU)
            for in_channels, out_channels, stride in zip((3, inner), (inner, width), strides, strict=True)
        ]
        super().__init__(*layers)


class Downsample(ConvNorm):
    """A dense 3x3 convolution of stride 2, and batch norm: [B, C, 2H, 2W] -> [B, 2C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width, 3, 2, None)


class Bottleneck(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(ConvNorm(width, width, 3), ConvNorm(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a map [B, C, H, W]."""
        out: Tensor = x + self.layers(x)
        return out


class C2f(nn.Module):
    """YOLOv8's block, as AM-RADIO's appendix B uses it.

    A 1x1 convolution, split in two; a chain of bottlenecks on the second half; both halves and every
    bottleneck's output, concatenated, through another 1x1 convolution.

    Args:
        width: C, in and out.
        depth: number of bottlenecks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        half = width // 2
        self.cv1 = ConvNorm(width, 2 * half, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(half) for _ in range(depth))
        self.cv2 = ConvNorm((2 + depth) * half, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a map [B, C, H, W]."""
        pieces = list(self.cv1(x).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            pieces.append(bottleneck(pieces[-1]))
        out: Tensor = self.cv2(torch.cat(pieces, dim=1))
        return out


class Neck(nn.Module):
    """The last map at twice its resolution, plus the map of the stage before (paper §5.1).

    Args:
        in_channels: C, channels of the stage before.
        last: D, channels of the last map.
        kind: `lateral` up-samples the last map at D channels and adds a 1x1 convolution of the earlier map;
            `stage-3` up-samples the last map to the earlier one's C channels and adds the two.
    """

    def __init__(self, in_channels: int, last: int, kind: NeckKind) -> None:
        super().__init__()
        if kind == "lateral":
            self.up = nn.ConvTranspose2d(last, last, 2, stride=2)
            self.lateral: nn.Module = nn.Conv2d(in_channels, last, 1)
            self.init_identity()
        else:
            self.up = nn.ConvTranspose2d(last, in_channels, 3, stride=2, padding=1, output_padding=1)
            self.lateral = nn.Identity()

    @torch.no_grad()
    def init_identity(self) -> None:
        """Initialise the neck to repeat each value of the last map in 2x2 and to ignore the earlier map.

        Losses on the tokens then train the last stage from the first step, as they do without a neck. The
        kind `stage-3` cannot reproduce the last map; its weights are left unchanged.
        """
        if isinstance(self.lateral, nn.Conv2d):
            self.up.weight.copy_(torch.eye(len(self.up.weight))[:, :, None, None].expand_as(self.up.weight))
            for rest in (self.up.bias, self.lateral.weight, self.lateral.bias):
                assert rest is not None
                nn.init.zeros_(rest)

    def forward(self, in_channels: Tensor, last: Tensor) -> Tensor:
        """Merge [B, C, 2H, 2W] and the last map [B, D, H, W] into [B, D or C, 2H, 2W]."""
        out: Tensor = self.up(last) + self.lateral(in_channels)
        return out


class ChannelAffine(nn.Module):
    """A factor and an offset per channel, equal to a batch norm with fixed statistics."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None, "a norm without statistics has nothing to fold"
        scale = norm.weight.detach() * torch.rsqrt(var + norm.eps)
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(norm.bias.detach() - mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply factor and offset to a map [B, C, H, W]."""
        return x * self.scale[:, None, None] + self.shift[:, None, None]


class PositionBias(nn.Module):
    """A bias for every head and pair of tokens, from an MLP over their distance.

    Distances are in tokens, spaced logarithmically (Swin V2, eq. 4), so that windows larger than those of
    training need little extrapolation.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, _HIDDEN)
        self.fc2 = nn.Linear(_HIDDEN, heads, bias=False)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None  # cached bias: its key, its value

    def forward(self, side: int) -> Tensor:
        """Compute the bias [1, h, s*s, s*s] (query token, key token) for a window of side s.

        Outside of training it is cached: it depends only on the side and the weights.
        """
        kind = self.fc1.weight.device.type
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or kind == "meta":
            return self._make(side)
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        made_of = (side, cast, *(_state(weight) for weight in self.parameters()))
        if self._kept is None or self._kept[0] != made_of:
            bias = self._make(side)
            if type(bias) is not Tensor:  # a tracer's tensor, without values
                return bias
            self._kept = made_of, bias
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        """Switch the mode and drop the cached bias."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the cached bias."""
        return {**self.__dict__, "_kept": None}

    def _make(self, side: int) -> Tensor:
        device, reach = self.fc1.weight.device, 2 * side - 1
        apart = torch.arange(1 - side, side, device=device).to(self.fc1.weight.dtype)
        spaced = apart.sign() * torch.log2(1 + apart.abs()) / math.log2(_UNIT)
        offsets = torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), dim=-1)
        table = self.fc2(F.relu(self.fc1(offsets.flatten(0, 1))))  # [(2s-1)^2, h]
        line = torch.arange(side, device=device)
        lag = line[:, None] - line[None, :] + side - 1  # [s, s]
        which = lag[:, None, :, None] * reach + lag[None, :, None, :]
        bias: Tensor = table[which.reshape(side * side, -1)].permute(2, 0, 1)
        return bias.contiguous()[None]  # fused kernels expect contiguous rows


def _state(weight: Tensor) -> tuple[object, ...]:
    """Return a key that changes when a weight's values, device or dtype change."""
    version = 0 if weight.is_inference() else weight._version
    return id(weight), version, weight.device, weight.dtype


class WindowBlock(nn.Module):
    """A pre-norm transformer block inside windows, without biases in the linear layers.

    Args:
        width: D.
        heads: attention heads; they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, bias=False)
        self.positions = PositionBias(heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, 4 * width, bias=False)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Apply the block to windows [M, s*s, D] of side s."""
        x = x + self.attn(self.norm1(x), self.positions(side))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class MultiResolutionBlock(nn.Module):
    """Windowed attention on a map, at its own resolution (ratio 1) or at half of it (ratio 2, appendix B).

    At ratio 2 a strided convolution halves the map, and a transposed convolution up-samples the output:
    `mix * (x + up(block(down(x))))`.

    Args:
        width: D.
        heads: attention heads.
        ratio: 1 or 2.
        mix: factor on the sum at ratio 2.
    """

    def __init__(self, width: int, heads: int, ratio: int, mix: float = 1.0) -> None:
        super().__init__()
        assert ratio in (1, 2)
        self.halved, self.mix = ratio == 2, mix
        self.down = nn.Conv2d(width, width, 2, stride=2) if self.halved else nn.Identity()
        self.block = WindowBlock(width, heads)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2) if self.halved else nn.Identity()

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Apply the block to a map [B, D, H, W]; the side divides H and W (at ratio 2 their halves)."""
        low = self.down(x)
        grid = low.shape[-2], low.shape[-1]
        found: Tensor = self.up(map_of(self.block(windows_of(low, side), side), grid, side))
        return self.mix * (x + found) if self.halved else found


def windows_of(x: Tensor, side: int) -> Tensor:
    """Split a map [B, D, H, W] into windows [M, s*s, D]; no copy if it is channels-last and one window.

    Raises:
        SizeError: the side does not divide H and W.
    """
    d, grid = x.shape[1], (x.shape[2], x.shape[3])
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    return to_windows(tokens, grid, side).reshape(-1, side * side, d)


def map_of(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Invert `windows_of`: [M, s*s, D] -> a channels-last map [B, D, H, W]."""
    (h, w), d = grid, x.shape[-1]
    plane: Tensor = from_windows(x.reshape(-1, h * w, d), grid, side).unflatten(1, grid)
    return plane.permute(0, 3, 1, 2)

"""The convolutional parts of a hybrid student: stem, C2f, down-sampling, and the neck that up-samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Letters: B batch, C channels, H W grid.

NeckKind = Literal["lateral", "stage-3"]


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

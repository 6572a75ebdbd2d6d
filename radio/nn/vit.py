"""The parts of the ViT students: patch embeddings, cropped positions (CPE), attention and blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-6  # ViT and DINOv2; PyTorch's own default is 1e-5

# Random crops of the table of positions.
MIN_SCALE = math.sqrt(0.1)
ASPECT = (3 / 4, 4 / 3)
DROP = 0.1

_BILINEAR, _ZEROS = 0, 0  # arguments of `grid_sampler_2d`: interpolation mode, padding mode

# Letters: B batch, T tokens, D width, H W grid, G side of the table of positions, h heads.


class Normalise(nn.Module):
    """(images - mean) / std per channel."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: tuple[float, float, float] = IMAGENET_MEAN, std: tuple[float, float, float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise [B, 3, h, w] in [0, 1]; the result has this module's dtype."""
        return (images.to(self.mean.dtype) - self.mean) / self.std


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
    """Factor a patch size into primes, ascending: 12 -> 2, 2, 3; others reduce too much in one layer."""
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


class CroppedPositions(nn.Module):
    """A learned G x G table of positions, cropped in training and resized in evaluation.

    Args:
        width: D, the token width.
        side: G; the paper uses 128 for patch 16 and 75 for patch 14.
        align_corners: how the table is resized in evaluation: its outermost positions stay those of the
            outermost patches, or cover the same area as they (False).
    """

    def __init__(self, width: int, side: int, *, align_corners: bool = False) -> None:
        super().__init__()
        self.side, self.align_corners = side, align_corners
        self.table = nn.Parameter(torch.empty(1, side * side, width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: tuple[int, int], crops: Tensor | None = None) -> Tensor:
        """Compute positions for a grid: [1, T, D] without crops, [B, T, D] with crops from `draw_crops`."""
        plane = self.table.float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        aligned = self.align_corners
        placed = _resized(plane, grid, aligned) if crops is None else _cropped(plane, grid, crops)
        return placed.flatten(2).transpose(1, 2).to(self.table.dtype)


def draw_crops(batch: int, generator: torch.Generator) -> Tensor:
    """Draw a random crop of the table per image: [B, 5] of x0, y0, width, height in [0, 1], keep (0 or 1).

    Scale s ~ U(sqrt 0.1, 1), aspect a = exp U(ln 3/4, ln 4/3), sides s*a and s/a clamped to 1, the corner
    uniform in the remaining range; with probability 0.1 an image gets no positions (CPE, as the paper's §4
    uses it; the numbers are those of the released models).
    """
    u = torch.rand(5, batch, generator=generator, device=generator.device)
    scale = MIN_SCALE + (1 - MIN_SCALE) * u[0]
    low, high = (math.log(bound) for bound in ASPECT)
    aspect = torch.exp(low + (high - low) * u[1])
    width, height = (scale * aspect).clamp(max=1.0), (scale / aspect).clamp(max=1.0)
    keep = (u[4] >= DROP).to(u.dtype)
    return torch.stack((u[2] * (1 - width), u[3] * (1 - height), width, height, keep), dim=1)


def _cropped(plane: Tensor, grid: tuple[int, int], crops: Tensor) -> Tensor:
    """Sample the table [1, D, G, G] inside each crop: [B, D, H, W].

    The crops of a batch are stacked into one tall grid, so that neither the table nor its gradient is copied
    per image. The operator is called directly: `grid_sample` uses cuDNN for tables of up to 1024 channels
    and torch's own kernel above, and every width must use the same kernel.
    """
    x0, y0, width, height, keep = crops.to(plane).unbind(1)
    xs = x0[:, None] + width[:, None] * torch.linspace(0, 1, grid[1], device=plane.device)
    ys = y0[:, None] + height[:, None] * torch.linspace(0, 1, grid[0], device=plane.device)
    b = crops.shape[0]
    where = torch.stack((xs[:, None, :].expand(b, *grid), ys[:, :, None].expand(b, *grid)), dim=-1)
    tall = 2 * where.view(1, -1, grid[1], 2) - 1  # [1, B*H, W, 2], x before y, in [-1, 1]
    sampled: Tensor = torch.ops.aten.grid_sampler_2d(plane, tall, _BILINEAR, _ZEROS, True)  # aligned corners
    return sampled.view(-1, b, *grid).transpose(0, 1) * keep[:, None, None, None]


def _resized(plane: Tensor, grid: tuple[int, int], align_corners: bool) -> Tensor:
    """Resize the table [1, D, G, G] to a square that covers the grid and crop it: [1, D, H, W]."""
    h, w = grid
    plane = F.interpolate(plane, size=(max(h, w),) * 2, mode="bilinear", align_corners=align_corners)
    # Not slices, whose flattening copies for some grids only: torch.export needs one answer for all.
    rows, columns = (torch.arange(side, device=plane.device) for side in grid)
    return plane.index_select(2, rows).index_select(3, columns)


class Attention(nn.Module):
    """Self-attention over all tokens of a sequence, through PyTorch's fused kernel.

    Args:
        width: D, the token width.
        heads: attention heads; they divide the width.
        bias: whether the linear layers have biases.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Apply self-attention to [B, T, D]; `positions` [1, h, T, T] is added to the logits."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        added = None if positions is None else positions.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return out


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int, out: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width if out is None else out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., out]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """silu(gate) * value, then Linear; gate and value come from one layer.

    Args:
        width: D, the token width.
        hidden: width of the gate and of the value.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch, small at the start (CaiT; DINOv2)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of [..., D]."""
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: D, the token width.
        heads: attention heads; they divide the width.
        hidden: the hidden width of the MLP.
        layer_scale: initial value of LayerScale; None leaves it out.
    """

    def __init__(self, width: int, heads: int, hidden: int, layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, hidden)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to tokens [B, T, D]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


def recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """Compute the block's output; recompute its activations in the backward pass.

    Running statistics are updated once, in the first pass. torch.compile ensures that itself: its second pass
    consists of the first one's operations without their side effects.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return compiled
    out: Tensor = checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _still(block))
    )
    return out


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Freeze the running statistics; they stay tracked, as autograd would otherwise save other tensors."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        counted = norm.num_batches_tracked
        norm.momentum, norm.num_batches_tracked = 0.0, None if counted is None else counted.clone()
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted

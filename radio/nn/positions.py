"""Cropped position embeddings (CPE): one square table for all image sizes (paper §4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Letters: B batch, T tokens, D width, H W grid, G side of the table.

MIN_SCALE = math.sqrt(0.1)
ASPECT = (3 / 4, 4 / 3)
DROP = 0.1

_BILINEAR, _ZEROS = 0, 0  # arguments of `grid_sampler_2d`: interpolation mode, padding mode


class CroppedPositions(nn.Module):
    """A learned G x G table of positions, cropped in training and resized in evaluation.

    Args:
        width: D, the token width.
        side: G; the paper uses 128 for patch 16 and 75 for patch 14.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.empty(1, side * side, width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: tuple[int, int], crops: Tensor | None = None) -> Tensor:
        """Compute positions for a grid: [1, T, D] without crops, [B, T, D] with crops from `draw_crops`."""
        plane = self.table.float().unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        placed = _resized(plane, grid) if crops is None else _cropped(plane, grid, crops)
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


def _resized(plane: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize the table [1, D, G, G] to a square that covers the grid and crop it: [1, D, H, W]."""
    h, w = grid
    if plane.shape[-1] != max(h, w):
        plane = F.interpolate(plane, size=(max(h, w),) * 2, mode="bilinear", align_corners=False)
    return plane[..., :h, :w]

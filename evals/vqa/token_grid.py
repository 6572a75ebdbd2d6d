"""Reduction of an image's tokens: averaging over a coarser grid of the same aspect ratio."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

# Letters: B batch, T tokens of an image, D token width, H W grid.

Grid = tuple[int, int]


def choose_grid(grid: Grid, most: int | None) -> Grid:
    """Choose the largest grid of about the same aspect ratio and at most `most` tokens; `grid` if it fits."""
    height, width = grid
    if most is None or height * width <= most:
        return grid
    scale = math.sqrt(most / (height * width))
    rows = max(1, min(int(height * scale + 1e-6), most))
    return rows, max(1, min(int(width * scale + 1e-6), most // rows))


def resample(tokens: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Average tokens [B, H*W, D] over a coarser grid: [B, h*w, D]."""
    if grid == wanted:
        return tokens
    spatial = tokens.transpose(1, 2).unflatten(2, grid)
    return F.adaptive_avg_pool2d(spatial, wanted).flatten(2).transpose(1, 2).contiguous()

"""Find points of images in other images by the cosine of tokens, many at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from radio.ops import resize_tokens

# Letters: M images, T tokens, D width, H W grid, Q points, K points on one image, P positions.

THRESHOLD = 0.1
"""A point is found if it is no farther off than this, in units of the object's box (PCK@0.1)."""

_NOISE = 2e-6  # cosines that differ by less are equal: products in float32 have errors of some 3e-7
_CELLS = 1 << 26  # numbers in memory at once


class Matches(NamedTuple):
    """How each point was matched; distances are in units of the longer side of the object's box."""

    error: Tensor  # [Q] float64, distance of the position that was chosen from the true point
    nearest: Tensor  # [Q] float64, of the nearest position
    chance: Tensor  # [Q] float64, share of the positions within `THRESHOLD`


def sample_points(tokens: Tensor, grid: tuple[int, int], image: Tensor, points: Tensor) -> Tensor:
    """Sample maps bilinearly at single points: [Q, D].

    Args:
        tokens: [M, T, D], row-major over the grid.
        image: [Q] the map of each point.
        points: [Q, 2] (x, y) in units of the image's sides; beyond the outer tokens' centres these count.
    """
    h, w = grid
    x, y = (
        (points[:, axis] * side - 0.5).clamp(0, side - 1).to(tokens.dtype) for axis, side in ((0, w), (1, h))
    )
    column, row = (each.floor().long() for each in (x, y))
    right, below = (column + 1).clamp(max=w - 1), (row + 1).clamp(max=h - 1)
    across, down = (x - column).unsqueeze(1), (y - row).unsqueeze(1)
    upper = tokens[image, row * w + column] * (1 - across) + tokens[image, row * w + right] * across
    lower = tokens[image, below * w + column] * (1 - across) + tokens[image, below * w + right] * across
    return upper * (1 - down) + lower * down


def positions(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return the centres (x, y) of a grid's tokens in units of the image's sides: [P, 2] float64."""
    y, x = ((torch.arange(side, dtype=torch.float64, device=device) + 0.5) / side for side in grid)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def match(
    tokens: Tensor,
    grid: tuple[int, int],
    images: Tensor,
    points: Tensor,
    reach: Tensor,
    *,
    upsample: int = 1,
) -> Matches:
    """Match points of one image to the positions of another with the highest cosine, the first of equal ones.

    Args:
        tokens: [M, T, D].
        images: [Q, 2] the image of each point, and the image that is searched.
        points: [Q, 2, 2] the point in both, (x, y) in units of the images' sides.
        reach: [Q] the longer side of the object's box in the image that is searched, in the same units.
        upsample: factor by which the map that is searched is up-sampled bilinearly.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    queries = F.normalize(sample_points(unit, grid, images[:, 0], points[:, 0]), dim=-1)
    fine = (grid[0] * upsample, grid[1] * upsample)
    places = positions(fine, tokens.device)
    # The points on one image side by side, so that one product serves them all: [M, K, ...].
    counts = images[:, 1].bincount(minlength=len(tokens))
    order = images[:, 1].argsort(stable=True)
    row = images[order, 1]
    column = torch.arange(len(order), device=tokens.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max())
    asked, truth = unit.new_zeros(len(unit), most, unit.shape[2]), points.new_zeros(len(unit), most, 2)
    asked[row, column], truth[row, column] = queries[order], points[order, 1]
    scale = reach.new_ones(len(unit), most)
    scale[row, column] = reach[order]
    step = max(1, _CELLS // (len(places) * max(unit.shape[2], 2 * most)))
    parts = []
    for start in range(0, len(unit), step):
        own = slice(start, start + step)
        searched = F.normalize(resize_tokens(unit[own], grid, fine), dim=-1)
        cosines = asked[own] @ searched.transpose(1, 2)  # [m, K, P]
        best = (cosines >= cosines.amax(-1, keepdim=True) - _NOISE).int().argmax(-1, keepdim=True)
        x, y = truth[own].unsqueeze(2).unbind(-1)  # [m, K, 1]
        offsets = torch.hypot(x - places[:, 0], y - places[:, 1]) / scale[own].unsqueeze(2)
        within = (offsets <= THRESHOLD).double().mean(-1)
        parts.append(torch.stack([offsets.gather(2, best).squeeze(2), offsets.amin(-1), within], dim=-1))
    result = torch.empty(len(order), 3, dtype=torch.float64, device=tokens.device)
    result[order] = torch.cat(parts)[row, column]
    return Matches(*result.unbind(1))

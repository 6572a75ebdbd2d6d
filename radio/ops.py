"""Tensor operations: attention windows (paper appendix C), interpolation of images and tokens, angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, SizeError
from .types import Features, Positions, Resampling, Sampling

# Letters: B batch, C summary width, T tokens, D width, H W grid, s window side, N windows per image.

_EPS = 1e-6  # length below which a vector has no direction


def to_windows(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Reorder tokens so that those of one window are contiguous: [B, T, D] -> [B, T, D].

    Windows are ordered row by row, and so are the tokens inside a window. Folding the windows into the batch
    is then a free view: [B, N*s*s, D] -> [B*N, s*s, D].

    Raises:
        SizeError: the grid does not divide into windows of that side.
    """
    check_window(grid, side)
    (h, w), (b, _, d) = grid, x.shape
    x = x.reshape(b, h // side, side, w // side, side, d)
    return x.transpose(2, 3).reshape(b, h * w, d)


def from_windows(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Invert `to_windows`: [B, T, D] in window order -> row-major over the grid."""
    check_window(grid, side)
    (h, w), (b, _, d) = grid, x.shape
    x = x.reshape(b, h // side, w // side, side, side, d)
    return x.transpose(2, 3).reshape(b, h * w, d)


def check_window(grid: tuple[int, int], side: int) -> None:
    """Check that the window divides the grid.

    Raises:
        SizeError: it does not; names the nearest sides that do.
    """
    h, w = grid
    if side < 1 or h % side or w % side:
        fitting = common_sides(grid)
        nearest = sorted(fitting, key=lambda s: (abs(s - side), s))[:2]
        raise SizeError(
            f"a {h}x{w} grid does not divide into {side}x{side} windows; nearest window sides that divide "
            f"it: {' and '.join(map(str, sorted(nearest)))}; or resize the input"
        )


def check_blocks(blocks: Sequence[int], num_blocks: int, name: str) -> None:
    """Check that an encoder, called `name` in the message, has all of these blocks, counted from 0.

    Raises:
        ConfigError: one does not exist, or none is asked for.
    """
    if not blocks:
        raise ConfigError(f"no block of {name} is named; wanted at least one of its {num_blocks}")
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise ConfigError(f"block {block} is not one of the {num_blocks} of {name}; count from 0")


def common_sides(grid: tuple[int, int]) -> list[int]:
    """List every window side that divides both sides of the grid, ascending."""
    h, w = grid
    return [side for side in range(1, min(h, w) + 1) if h % side == 0 and w % side == 0]


def choose_side(grid: tuple[int, int], least: int, most: int) -> int | None:
    """Choose the largest side from `least` to `most` that divides the grid, else the smallest above `most`.

    None if no side of at least `least` divides the grid.
    """
    fitting = [side for side in common_sides(grid) if side >= least]
    within = [side for side in fitting if side <= most]
    return max(within) if within else min(fitting, default=None)


def nearest_multiple(pixels: int, step: int) -> int:
    """Round pixels to the nearest multiple of `step`, at least one step; ties round up."""
    return max(1, (2 * pixels + step) // (2 * step)) * step


def resize_images(
    images: Tensor, size: tuple[int, int], mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Resize images [B, 3, h, w] to another (height, width), antialiased.

    Floats in [0, 1] are clamped to [0, 1]; uint8 is computed in 8 bits, rounded after each axis.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    resized = F.interpolate(images, size=size, mode=mode, antialias=True, align_corners=False)
    return resized if resized.dtype == torch.uint8 else resized.clamp_(0.0, 1.0)


def resize_tokens(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Resample tokens [B, T, D] bilinearly from one grid to another (paper §4), in float32."""
    if grid == to:
        return tokens
    plane = tokens.transpose(1, 2).unflatten(2, grid).float()
    plane = F.interpolate(plane, size=to, mode="bilinear", align_corners=False)
    return plane.flatten(2).transpose(1, 2).to(tokens.dtype)


def sample_tokens(tokens: Tensor, grid: tuple[int, int], at: Sampling) -> Tensor:
    """Sample tokens [B, T, D] of a grid at positions inside it: [B, H*W, D] of the sampling's own H x W.

    Centres of neighbouring tokens are cut out as they are; between centres tokens are interpolated
    bilinearly, in float32. Positions have to lie between the centres of the first and the last token.
    """
    rows, columns = at
    if rows.are_tokens and columns.are_tokens:
        if at.grid == grid:
            return tokens
        top, left = int(rows.first), int(columns.first)
        plane: Tensor = tokens.unflatten(1, grid)
        return plane[:, top : top + rows.length, left : left + columns.length].flatten(1, 2)
    whole = tokens.transpose(1, 2).unflatten(2, grid).float()
    y, x = (
        _unit_positions(along, side, tokens.device) for along, side in zip((rows, columns), grid, strict=True)
    )
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).expand(len(tokens), -1, -1, -1)
    sampled = F.grid_sample(whole, places, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.flatten(2).transpose(1, 2).to(tokens.dtype)


def _unit_positions(at: Positions, side: int, device: torch.device) -> Tensor:
    """Convert positions on a side of so many tokens to torch's: -1 and 1 are its edges, not its centres."""
    indices = torch.arange(at.length, dtype=torch.float32, device=device)
    return indices.mul_(float(2 * at.step / side)).add_(float((2 * at.first + 1) / side - 1))


def resize_features(features: Features, to: Resampling) -> Features:
    """Resample the tokens of features to another grid, whole or in part; the summary is unchanged."""
    if isinstance(to, Sampling):
        return Features(features.summary, sample_tokens(features.tokens, features.grid, to), to.grid)
    return Features(features.summary, resize_tokens(features.tokens, features.grid, to), to)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Compute the angles [...] between vectors [..., C] in radians; zero vectors are at a right angle to all.

    By the half angle's tangent, whose gradient is bounded where the arc cosine's is not: at 0 and at pi.
    """
    u, v = F.normalize(a, dim=-1, eps=_EPS), F.normalize(b, dim=-1, eps=_EPS)
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))

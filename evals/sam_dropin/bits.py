"""Masks as bits, eight rows per byte: counting and erosion work on an eighth of the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Letters: N masks, H W pixels, R bytes per column = ceil(H / 8).


def pack(masks: Tensor) -> Tensor:
    """Pack masks, bool [N, H, W], as uint8 [N, R, W]; bit k of byte i is row 8 * i + k; padded with 0."""
    rows = masks.view(torch.uint8)
    if masks.shape[1] % 8:
        rows = F.pad(rows, [0, 0, 0, -masks.shape[1] % 8])
    planes = rows.unflatten(1, (-1, 8))
    packed: Tensor = planes[:, :, 0].clone()
    for bit in range(1, 8):
        packed |= planes[:, :, bit] << bit
    return packed


def count(bits: Tensor) -> Tensor:
    """Count the set bits: [N, R, W] -> [N] float64; summed in pairs, fours, bytes, then words."""
    flat = bits.flatten(1)
    words = F.pad(flat, [0, -flat.shape[1] % 8]).view(torch.int64)
    words = words - (words >> 1).bitwise_and_(0x5555555555555555)
    fours = (words >> 2).bitwise_and_(0x3333333333333333)
    words.bitwise_and_(0x3333333333333333).add_(fours)
    words.add_(words >> 4).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56).sum(dim=1).double()


def erode(bits: Tensor, reach: int) -> Tensor:
    """Erode masks `reach` times by 3 x 3: [N, R, W] -> [N, R, W]; the outside counts as unset.

    A pixel remains where the square of side 2 * reach + 1 around it is full; this is computed by doubling, so
    the cost grows with the logarithm of the reach.
    """
    left = torch.zeros_like(bits)
    side = 2 * reach + 1
    if side <= bits.shape[2]:
        across = _run(bits, side, lambda full, step: full[..., :-step] & full[..., step:])
        down = _run(across, side, lambda full, step: full & _rows_up(full, step))
        left[..., reach:-reach] = _rows_down(down, reach)
    return left


def _run(bits: Tensor, length: int, join: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Mark where runs of `length` set bits begin; `join` intersects bits with those some steps later."""
    full, reached = bits, 1
    while reached < length:
        step = min(reached, length - reached)
        full, reached = join(full, step), reached + step
    return full


def _rows_up(bits: Tensor, rows: int) -> Tensor:
    """Shift rows up: row i + `rows` moves to row i."""
    whole, rest = divmod(rows, 8)
    moved = F.pad(bits, [0, 0, 0, whole + 1])[:, whole:]
    return moved[:, :-1] if not rest else (moved[:, :-1] >> rest) | (moved[:, 1:] << (8 - rest))


def _rows_down(bits: Tensor, rows: int) -> Tensor:
    """Shift rows down: row i - `rows` moves to row i."""
    whole, rest = divmod(rows, 8)
    moved = F.pad(bits, [0, 0, whole + 1, 0])[:, : bits.shape[1] + 1]
    return moved[:, 1:] if not rest else (moved[:, 1:] << rest) | (moved[:, :-1] >> (8 - rest))

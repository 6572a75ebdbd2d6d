"""Masks as bits, eight rows to a byte: what is counted and eroded is an eighth as large."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Letters: N masks, H W pixels, R bytes a column = ceil(H / 8).


def pack(masks: Tensor) -> Tensor:
    """Masks, bool [N, H, W], as bits: uint8 [N, R, W]; bit k of byte i is row 8 * i + k, 0 past the last."""
    rows = masks.view(torch.uint8)
    if masks.shape[1] % 8:
        rows = F.pad(rows, [0, 0, 0, -masks.shape[1] % 8])
    planes = rows.unflatten(1, (-1, 8))
    packed: Tensor = planes[:, :, 0].clone()
    for bit in range(1, 8):
        packed |= planes[:, :, bit] << bit
    return packed


def count(bits: Tensor) -> Tensor:
    """How many bits are set: [N, R, W] -> [N] float64; pairs, fours, bytes, then words at once."""
    flat = bits.flatten(1)
    words = F.pad(flat, [0, -flat.shape[1] % 8]).view(torch.int64)
    words = words - (words >> 1).bitwise_and_(0x5555555555555555)
    fours = (words >> 2).bitwise_and_(0x3333333333333333)
    words.bitwise_and_(0x3333333333333333).add_(fours)
    words.add_(words >> 4).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56).sum(dim=1).double()


def erode(bits: Tensor, reach: int) -> Tensor:
    """What is left of masks after `reach` erosions by 3 x 3: [N, R, W] -> the same; the outside is unset.

    A pixel stays where the square of 2 * reach + 1 around it is full; that is found by doubling, so the reach
    costs its logarithm.
    """
    left = torch.zeros_like(bits)
    side = 2 * reach + 1
    if side <= bits.shape[2]:
        across = _run(bits, side, lambda full, step: full[..., :-step] & full[..., step:])
        down = _run(across, side, lambda full, step: full & _rows_up(full, step))
        left[..., reach:-reach] = _rows_down(down, reach)
    return left


def _run(bits: Tensor, length: int, join: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Where a run of `length` set bits begins; `join` meets runs with those that begin some steps later."""
    full, reached = bits, 1
    while reached < length:
        step = min(reached, length - reached)
        full, reached = join(full, step), reached + step
    return full


def _rows_up(bits: Tensor, rows: int) -> Tensor:
    """Row i + `rows` at row i."""
    whole, rest = divmod(rows, 8)
    moved = F.pad(bits, [0, 0, 0, whole + 1])[:, whole:]
    return moved[:, :-1] if not rest else (moved[:, :-1] >> rest) | (moved[:, 1:] << (8 - rest))


def _rows_down(bits: Tensor, rows: int) -> Tensor:
    """Row i - `rows` at row i."""
    whole, rest = divmod(rows, 8)
    moved = F.pad(bits, [0, 0, whole + 1, 0])[:, : bits.shape[1] + 1]
    return moved[:, 1:] if not rest else (moved[:, 1:] << rest) | (moved[:, :-1] >> (8 - rest))

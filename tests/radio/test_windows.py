"""Windows as reshapes, against a loop over windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radio.errors import SizeError
from radio.ops import (
    check_window,
    choose_side,
    common_sides,
    from_windows,
    nearest_multiple,
    to_windows,
)

GRIDS = [
    ((72, 72), 8),
    ((72, 72), 9),
    ((72, 72), 18),
    ((36, 72), 9),
    ((72, 36), 12),
    ((6, 9), 3),
    ((5, 7), 1),
]


def _windows_by_loop(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[B, T, D] -> [B, N, s*s, D], window by window."""
    plane = x.unflatten(1, grid)
    found = [
        plane[:, top : top + side, left : left + side].flatten(1, 2)
        for top in range(0, grid[0], side)
        for left in range(0, grid[1], side)
    ]
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(("grid", "side"), GRIDS)
def test_windows_equal_the_loop_and_come_back(grid, side):
    x = torch.arange(2 * grid[0] * grid[1] * 3, dtype=torch.float32).reshape(2, -1, 3)
    windows = to_windows(x, grid, side)
    assert torch.equal(windows.reshape(2, -1, side * side, 3), _windows_by_loop(x, grid, side))
    assert torch.equal(from_windows(windows, grid, side), x)


def test_folding_the_windows_into_the_batch_copies_nothing():
    windows = to_windows(torch.zeros(2, 36, 5), (6, 6), 3)
    assert windows.view(-1, 9, 5).data_ptr() == windows.data_ptr()


def test_one_window_over_the_grid_keeps_the_order():
    x = torch.randn(2, 16, 3)
    assert torch.equal(to_windows(x, (4, 4), 4), x)


@pytest.mark.parametrize(
    ("grid", "side", "nearest"),
    [
        ((72, 72), 10, "8 and 9"),
        ((72, 72), 7, "6 and 8"),
        ((72, 72), 100, "36 and 72"),
        ((36, 72), 30, "18 and 36"),
        ((72, 72), 0, "1 and 2"),
        ((7, 11), 3, "1"),
    ],
)
def test_a_window_that_does_not_divide_names_the_nearest_that_do(grid, side, nearest):
    with pytest.raises(SizeError, match=f"{grid[0]}x{grid[1]} grid .* {side}x{side} windows; .*: {nearest};"):
        to_windows(torch.zeros(1, grid[0] * grid[1], 1), grid, side)
    with pytest.raises(SizeError, match="resize the input"):
        from_windows(torch.zeros(1, grid[0] * grid[1], 1), grid, side)


def test_common_sides_are_those_that_a_trial_division_finds():
    assert common_sides((72, 36)) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    for side in common_sides((72, 36)):
        check_window((72, 36), side)


@pytest.mark.parametrize(
    ("grid", "side"),
    [
        ((7, 7), 7),
        ((32, 32), 16),
        ((10, 15), 5),
        ((17, 34), 17),
        ((3, 9), None),
        ((8, 9), None),
        ((4, 40), 4),
    ],
)
def test_the_side_that_is_chosen(grid, side):
    assert choose_side(grid, 4, 16) == side


@pytest.mark.parametrize(
    ("pixels", "step", "wanted"),
    [(1, 14, 14), (21, 14, 28), (20, 14, 14), (35, 14, 42), (96, 32, 96), (80, 32, 96)],
)
def test_the_nearest_multiple_of_two_equally_near_is_the_larger(pixels, step, wanted):
    assert nearest_multiple(pixels, step) == wanted

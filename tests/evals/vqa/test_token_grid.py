"""A coarser grid: how large it is, and what its tokens are."""

from __future__ import annotations

import pytest
import torch

from evals.vqa.llava import choose_grid, resample


@pytest.mark.parametrize(
    ("grid", "most", "chosen"),
    [
        ((64, 64), 1024, (32, 32)),  # SAM's
        ((64, 64), 576, (24, 24)),
        ((64, 64), 1000, (31, 31)),
        ((64, 64), 1, (1, 1)),
        ((24, 24), 576, (24, 24)),
        ((24, 24), None, (24, 24)),
        ((20, 40), 200, (10, 20)),
        ((1, 1000), 10, (1, 10)),
        ((1000, 1), 10, (10, 1)),
    ],
)
def test_the_largest_grid_that_fits(grid: tuple[int, int], most: int | None, chosen: tuple[int, int]) -> None:
    assert choose_grid(grid, most) == chosen


def test_each_token_is_the_mean_of_those_it_stands_for() -> None:
    tokens = torch.rand(2, 6 * 4, 3, generator=torch.Generator().manual_seed(0))
    coarse = resample(tokens, (6, 4), (3, 2))
    for row in range(3):
        for column in range(2):
            places = [y * 4 + x for y in (2 * row, 2 * row + 1) for x in (2 * column, 2 * column + 1)]
            mean = sum(tokens[:, place] for place in places) / 4
            assert torch.allclose(coarse[:, row * 2 + column], mean, atol=1e-6)
    assert resample(tokens, (6, 4), (6, 4)) is tokens

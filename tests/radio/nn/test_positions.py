"""Cropped position embeddings, against loops over images and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from radio.nn.vit import CroppedPositions, draw_crops


@pytest.fixture
def positions() -> CroppedPositions:
    torch.manual_seed(3)
    return CroppedPositions(4, 6)


def _crop_by_loop(table: Tensor, grid: tuple[int, int], crop: list[float]) -> Tensor:
    """One image's positions [T, D]: the crop's corner tokens lie exactly on the crop's corners."""
    side = math.isqrt(table.shape[1])
    plane = table[0].unflatten(0, (side, side))
    x0, y0, width, height, keep = crop
    rows = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = (y0 + height * (i / (grid[0] - 1) if grid[0] > 1 else 0)) * (side - 1)
            x = (x0 + width * (j / (grid[1] - 1) if grid[1] > 1 else 0)) * (side - 1)
            top, left = min(math.floor(y), side - 2), min(math.floor(x), side - 2)
            v, u = y - top, x - left
            above = (1 - u) * plane[top, left] + u * plane[top, left + 1]
            below = (1 - u) * plane[top + 1, left] + u * plane[top + 1, left + 1]
            rows.append(keep * ((1 - v) * above + v * below))
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (9, 4), (4, 9), (12, 12), (1, 1), (1, 7)])
def test_evaluation_resizes_to_the_longer_side_and_cuts(positions, bilinear_by_loop, grid):
    plane = positions.table.detach()[0].unflatten(0, (6, 6))
    wanted = bilinear_by_loop(plane, (max(grid),) * 2)[: grid[0], : grid[1]].flatten(0, 1)
    torch.testing.assert_close(positions(grid)[0].detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (9, 4), (1, 7), (1, 1)])
def test_training_crops_equal_a_loop_over_images(positions, grid):
    crops = draw_crops(12, torch.Generator().manual_seed(1))
    crops[3, 4] = 0.0  # one image without positions, whatever was drawn
    crops[4] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])  # and one with the whole table
    wanted = torch.stack([_crop_by_loop(positions.table, grid, crop) for crop in crops.tolist()])
    found = positions(grid, crops)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert found[3].abs().max() == 0
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((p * weights).sum(), positions.table)[0] for p in (found, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)


def test_the_whole_table_at_its_own_size_is_the_table(positions):
    whole = positions((6, 6), torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(whole, positions.table)
    assert torch.equal(positions((6, 6)), positions.table)


def test_crops_keep_to_their_ranges():
    crops = draw_crops(50_000, torch.Generator().manual_seed(0)).double()
    x0, y0, width, height, keep = crops.unbind(1)
    eps = 1e-6
    assert crops.min() >= 0 and (x0 + width).max() <= 1 + eps and (y0 + height).max() <= 1 + eps
    free = (width < 1) & (height < 1)  # not clamped: the scale and aspect can be read off
    scale, aspect = (width * height)[free].sqrt(), (width / height)[free].sqrt()
    assert math.sqrt(0.1) - eps <= scale.min() < 0.32 and scale.max() <= 1
    assert 0.75 - eps <= aspect.min() < 0.751 and 1.332 < aspect.max() <= 4 / 3 + eps
    # Below 3/4 nothing is ever clamped, so there the scale must be uniform, and so must log aspect.
    small = scale < 0.75
    expected = (0.5 - math.sqrt(0.1)) / (0.75 - math.sqrt(0.1))
    assert (scale[small] < 0.5).double().mean().item() == pytest.approx(expected, abs=0.01)
    assert aspect[small].log().mean().item() == pytest.approx(0.0, abs=0.01)
    assert aspect[small].log().std().item() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.02)
    for corner, extent in ((x0, width), (y0, height)):
        placed = (corner / (1 - extent))[extent < 0.99]
        assert placed.mean().item() == pytest.approx(0.5, abs=0.01)
        assert placed.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.02)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.mean().item() == pytest.approx(0.9, abs=0.006)


def test_crops_follow_their_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (draw_crops(8, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_half_precision_table_is_resized_in_float32(positions):
    table = positions.table.detach().bfloat16()
    positions.to(torch.bfloat16)
    exact = CroppedPositions(4, 6)
    exact.table.data = table.float()
    for crops in (None, draw_crops(3, torch.Generator().manual_seed(0))):
        assert torch.equal(positions((5, 7), crops), exact((5, 7), crops).bfloat16())

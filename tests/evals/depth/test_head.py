"""The head against a slow loop, the loss against hand values, the measures against MMSegmentation's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error

from evals.depth.data import EIGEN_CROP
from evals.depth.head import MEASURES, DepthHead, measure, one_cycle, resize_depth, sig_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_head(width: int = 6) -> DepthHead:
    head = DepthHead(width, torch.Generator().manual_seed(1))
    head.train()
    for seed in range(5):
        head(3 * random(2, width, 3, 4, seed=seed))
    return head.eval()


def test_depth_is_the_weighted_mean_of_bins_of_upsampled_tokens() -> None:
    head, maps = make_head(), 3 * random(2, 6, 3, 4, seed=9)
    with torch.no_grad():
        depths = head(maps)
        plane = F.interpolate(maps, scale_factor=4, mode="bilinear")  # the tokens first, as published
        scores = head.conv(head.bn(plane)).numpy().astype(np.float64)
    bins = 1e-3 + np.arange(256) * (10 - 1e-3) / 255
    expected = np.empty((2, 12, 16))
    for image, row, column in np.ndindex(expected.shape):
        weights = np.maximum(scores[image, :, row, column], 0) + 0.1
        expected[image, row, column] = sum(weights / weights.sum() * bins)
    assert depths.shape == (2, 12, 16)
    assert np.abs(depths.numpy() - expected).max() < 1e-5


def test_a_head_is_a_function_of_its_seed_within_torchs_range() -> None:
    one, same, other = (DepthHead(16, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.conv.weight, same.conv.weight)
    assert not torch.equal(one.conv.weight, other.conv.weight)
    assert one.conv.weight.abs().max() <= 0.25 and one.conv.weight.abs().max() > 0.24


def test_a_resized_map_keeps_a_plane() -> None:
    plane = torch.linspace(1, 5, 8).expand(2, 6, 8)
    resized = resize_depth(plane, (12, 32))
    inside = resized[:, :, 2:-2]
    assert torch.allclose(inside.diff(dim=-1), torch.full((1,), 4 / 7 / 4), atol=1e-5)


def sigloss(ratios: list[float]) -> float:
    """The published loss, by its words."""
    mean = sum(ratios) / len(ratios)
    variance = sum((g - mean) ** 2 for g in ratios) / (len(ratios) - 1)
    return math.sqrt(variance + 0.15 * mean**2)


def test_the_loss_by_hand() -> None:
    truth = torch.tensor([[[1.0, 2.0, 0.0]]])
    ratios = torch.tensor([[[0.1, 0.3, 5.0]]])
    depths = (truth + 1e-3) * ratios.exp() - 1e-3
    assert sig_loss(depths, truth).item() == pytest.approx(math.sqrt(0.02 + 0.15 * 0.04), abs=1e-6)
    assert sig_loss(depths, truth, mean_only=True).item() == pytest.approx(math.sqrt(0.15) * 0.2, abs=1e-6)


def test_the_loss_is_eigens_over_the_whole_batch() -> None:
    truth, depths = 9 * random(3, 8, 9) + 0.1, 9 * random(3, 8, 9, seed=1) + 0.1
    truth[random(3, 8, 9, seed=2) < 0.3] = 0
    known = truth > 0
    ratios = (torch.log(depths + 1e-3) - torch.log(truth + 1e-3))[known].double()
    assert sig_loss(depths, truth).item() == pytest.approx(sigloss(ratios.tolist()), abs=1e-6)
    count = len(ratios)
    eigen = ratios.square().mean() - 0.85 * ratios.mean() ** 2  # with the biased variance
    unbiased = eigen + ratios.var(unbiased=False) / (count - 1)
    assert sig_loss(depths, truth).item() == pytest.approx(float(unbiased.sqrt()), abs=1e-6)


@pytest.mark.parametrize("mean_only", [True, False])
def test_the_loss_has_a_gradient_where_it_is_zero_or_nothing_is_known(mean_only: bool) -> None:
    for truth in (torch.zeros(1, 2, 2), torch.ones(1, 2, 2)):
        depths = torch.ones(1, 2, 2, requires_grad=True)
        loss = sig_loss(depths, truth, mean_only=mean_only)
        loss.backward()
        assert loss.item() < 1e-5
        assert depths.grad is not None and torch.isfinite(depths.grad).all()


@pytest.mark.parametrize(("warmup", "steps"), [(10, 30), (100, 300), (2, 7)])
def test_the_learning_rate_is_torchs_one_cycle(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        1.0,
        total_steps=steps,
        pct_start=warmup / steps,
        cycle_momentum=False,
        final_div_factor=100,
    )
    for step in range(steps):
        assert one_cycle(step, warmup, steps) == pytest.approx(schedule.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        schedule.step()


def test_the_shortest_schedules_have_a_rate() -> None:
    assert [one_cycle(step, 1, 3) for step in range(3)] == pytest.approx([1, (1 + 1 / 2500) / 2, 1 / 2500])
    assert one_cycle(0, 1, 1) == 1


def test_the_measures_are_mmsegmentations() -> None:
    pytest.importorskip("mmseg")
    from evals.seg_probe.evaluator import load_plugin

    load_plugin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmseg.evaluation import DepthMetric
    truth, depths = 11 * random(2, 480, 640), 9.9 * random(2, 480, 640, seed=1) + 0.01
    truth[random(2, 480, 640, seed=2) < 0.2] = 0
    metric = DepthMetric(min_depth_eval=1e-3, max_depth_eval=10.0, crop_type="nyu_crop")
    scored = torch.zeros_like(truth)
    scored[:, *EIGEN_CROP] = truth[:, *EIGEN_CROP]
    for row, measured in enumerate(measure(depths, scored)):
        mask = metric._get_eval_mask(truth[row])
        expected = metric._calc_all_metrics(truth[row][mask].double(), depths[row][mask].double())
        for name, value in zip(MEASURES, measured.tolist(), strict=True):
            assert value == pytest.approx(expected[name], abs=1e-6), name


def test_the_measures_are_scikit_learns_and_depths_are_clamped() -> None:
    truth, depths = 9 * random(1, 20, 30) + 0.5, 14 * random(1, 20, 30, seed=1) - 2
    flat, clamped = truth.double().flatten(), depths.clamp(1e-3, 10).double().flatten()
    measured = dict(zip(MEASURES, measure(depths, truth)[0].tolist(), strict=True))
    assert measured["rmse"] == pytest.approx(root_mean_squared_error(flat, clamped), abs=1e-9)
    assert measured["abs_rel"] == pytest.approx(mean_absolute_percentage_error(flat, clamped), abs=1e-9)


def test_perfect_depth_and_a_map_without_pixels() -> None:
    truth = torch.stack([torch.full((4, 4), 3.0), torch.zeros(4, 4), torch.full((4, 4), 10.0)])
    measured = measure(truth, truth)
    assert measured[0].tolist() == [0, 0, 1, 1, 1, 0]
    assert measured[1:].isnan().all()

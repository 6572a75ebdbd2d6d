"""Differences of lines against scipy, slow loops and hand values; what verdict they give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from evals.core.stats import resamples
from train.tables.results import Score
from train.tables.verdicts import Difference, _student, difference, judge, rank_agreement


def exact(*values: float) -> list[Score]:
    """Scores without any error over images."""
    return [Score(value=value, low=value, high=value) for value in values]


def test_the_seeds_interval_is_welchs() -> None:
    ours, theirs = (80.1, 81.4, 80.9), (78.8, 79.9, 79.0)
    found = difference(exact(*ours), exact(*theirs))
    expected = scipy.stats.ttest_ind(ours, theirs, equal_var=False)
    freedom = expected.df
    low, high = expected.confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.low is not None and found.high is not None
    # with the quantile of the next lower whole number of degrees of freedom, which is the wider
    factor = scipy.stats.t.ppf(0.975, int(freedom)) / scipy.stats.t.ppf(0.975, freedom)
    assert found.high - found.value == pytest.approx((high - low) / 2 * factor, rel=1e-4)
    assert 1 <= factor < 1.2


def test_a_frozen_model_has_no_error_of_seeds() -> None:
    found = difference(exact(80.0, 82.0), exact(75.0), trained=(True, False))
    half = 12.7062 * math.sqrt(np.var([80.0, 82.0], ddof=1) / 2)
    assert (found.low, found.high) == pytest.approx((6 - half, 6 + half), rel=1e-5)
    assert difference(exact(80.0), exact(75.0)) == Difference(5.0, 5.0, 5.0)


def test_a_student_with_one_seed_varies_as_the_other_does() -> None:
    ours, theirs = (80.1, 81.4, 80.9), (78.8,)
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(np.var(ours, ddof=1) * (1 / 3 + 1))
    for sides in ((ours, theirs), (theirs, ours)):
        found = difference(*(exact(*side) for side in sides))
        assert found.high == pytest.approx(found.value + half, rel=1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 11, 12, 20, 29, 100])
def test_the_quantile_is_students(degrees: int) -> None:
    assert _student(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=2.5e-3)
    assert _student(degrees - 1e-12) == _student(degrees)  # as floating point has it
    assert _student(degrees + 0.9) == _student(degrees)


def blocks_of(hits: np.ndarray, size: int) -> Score:
    """A mean over parts of one: hits [B] of `size` in each block."""
    blocks = tuple(((float(hit),), (float(size),)) for hit in hits)
    return Score(value=100 * float(hits.sum()) / (size * len(hits)), pairing="mean", blocks=blocks)


def test_the_images_interval_is_a_paired_bootstrap_over_blocks() -> None:
    generator = np.random.default_rng(0)
    theirs = generator.integers(30, 40, 30)
    ours = theirs + generator.integers(0, 4, 30)  # nearly the same on every block
    found = difference([blocks_of(ours, 50)], [blocks_of(theirs, 50)])
    drawn = []
    for weights in resamples(30):  # a slow loop over resamples
        for weight in weights:
            drawn.append(
                100 * sum(w * (a - b) for w, a, b in zip(weight, ours, theirs, strict=True)) / (50 * 30)
            )
    half = scipy.stats.t.ppf(0.975, 29) * math.sqrt(30 / 29) * float(np.std(drawn, ddof=1))
    assert found.low == pytest.approx(found.value - half, rel=1e-3)
    assert found.high == pytest.approx(found.value + half, rel=1e-3)
    # which is, but for the resamples' own error, the t interval of the differences by block
    by_block = scipy.stats.ttest_rel(2.0 * ours, 2.0 * theirs).confidence_interval(0.95)
    assert found.high - found.low == pytest.approx(by_block.high - by_block.low, rel=0.08)
    unpaired = [Score(value=50.0, low=45.0, high=55.0)]
    wide = difference(unpaired, [Score(value=48.0, low=44.0, high=52.0)])
    assert wide.high == pytest.approx(2 + math.hypot(5, 4))


def test_areas_are_paired_though_one_side_lacks_the_last_class() -> None:
    ours = Score(value=50.0, pairing="mean_iou", blocks=(((4.0, 0.0), (4.0, 4.0), (8.0, 0.0)),) * 3)
    theirs = Score(value=50.0, pairing="mean_iou", blocks=(((4.0,), (8.0,), (4.0,)),) * 3)
    found = difference([ours], [theirs])
    assert found == Difference(0.0, 0.0, 0.0)  # all blocks are alike


def test_means_of_other_parts_are_not_paired() -> None:
    one = Score(value=50.0, low=47.0, high=53.0, pairing="mean", blocks=(((1.0,), (2.0,)),) * 3)
    two = Score(value=50.0, low=46.0, high=54.0, pairing="mean", blocks=(((1.0, 1.0), (2.0, 2.0)),) * 3)
    assert difference([one], [two]) == Difference(0.0, -5.0, 5.0)  # 3 and 4, as if independent


def test_one_block_gives_no_error_of_images() -> None:
    one = blocks_of(np.array([30]), 50)
    assert difference([one], [blocks_of(np.array([20]), 50)]) == Difference(20.0, None, None)


def test_without_any_interval_there_is_none() -> None:
    bare = [Score(value=1.0)]
    assert difference(bare, bare) == Difference(0.0, None, None)
    assert judge(difference(bare, bare), 1.0) is None


@pytest.mark.parametrize(
    ("found", "papers", "verdict"),
    [
        (Difference(2.0, 1.0, 3.0), 0.5, "holds"),
        (Difference(-2.0, -3.0, -1.0), -0.5, "holds"),
        (Difference(2.0, -1.0, 5.0), 0.5, "as the paper, within noise"),
        (Difference(2.0, -1.0, 5.0), -0.5, "opposite, within noise"),
        (Difference(2.0, 1.0, 3.0), -0.5, "reversed"),
        (Difference(0.0, -1.0, 1.0), 0.5, "tie"),
        (Difference(0.0, 0.0, 0.0), -0.5, "tie"),
        (Difference(2.0, 1.0, 3.0), 0.0, None),
        (Difference(2.0, 1.0, 3.0), None, None),
    ],
)
def test_the_verdict(found: Difference, papers: float | None, verdict: str | None) -> None:
    assert judge(found, papers) == verdict


def test_the_agreement_of_two_orders_is_kendalls_tau() -> None:
    ours, papers = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 7.0, 1.0, 8.0, 2.8]
    assert rank_agreement(ours, papers) == pytest.approx(scipy.stats.kendalltau(ours, papers).statistic)
    assert rank_agreement([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(
        2 / 3
    )  # the tie counts for neither
    assert rank_agreement([1.0], [2.0]) is None

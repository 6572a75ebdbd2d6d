from __future__ import annotations

import numpy as np
import pytest

from evals.core.stats import interval, resamples
from radio.errors import DataError


def test_every_resample_draws_as_many_as_there_are() -> None:
    counts = resamples(37, seed=3)
    assert counts.shape == (1000, 37)
    assert set(counts.sum(axis=1)) == {37.0}
    np.testing.assert_array_equal(counts, resamples(37, seed=3))
    assert not np.array_equal(counts, resamples(37, seed=4))


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 900)
    low, high = interval(resamples(900) @ values / 900)
    half = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_resamples_without_a_value_are_left_out() -> None:
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)


def test_nothing_has_no_interval() -> None:
    with pytest.raises(DataError, match="nothing was scored"):
        resamples(0)

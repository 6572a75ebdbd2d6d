from __future__ import annotations

import numpy as np
import pytest

from evals.core import stats
from evals.core.stats import interval, resampled_sums, resamples
from radio.errors import DataError


def counts(number: int, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(resamples(number, seed=seed)))


def test_every_resample_draws_as_many_as_there_are() -> None:
    drawn = counts(37, seed=3)
    assert drawn.shape == (1000, 37)
    assert set(drawn.sum(axis=1)) == {37.0}
    np.testing.assert_array_equal(drawn, counts(37, seed=3))
    assert not np.array_equal(drawn, counts(37, seed=4))
    # Each unit's count is binomial: 37 draws of probability 1 / 37.
    assert drawn.var(axis=0).mean() == pytest.approx(36 / 37, abs=0.02)
    assert np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1] == pytest.approx(-1 / 36, abs=0.1)


@pytest.mark.parametrize("cells", [1, 100, 37 * 300, 1 << 22])
def test_sums_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    values = np.random.default_rng(1).normal(size=(37, 2, 3))
    expected = [sum(n * v for n, v in zip(row, values, strict=True)) for row in counts(37, seed=3)]
    monkeypatch.setattr(stats, "_CELLS", cells)
    assert max(map(len, resamples(37))) <= max(1, cells // 37)
    np.testing.assert_allclose(resampled_sums(values, seed=3), expected, atol=1e-12)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 900)
    low, high = interval(resampled_sums(values) / 900)
    half = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_resamples_without_a_value_are_left_out() -> None:
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)


def test_nothing_has_no_interval() -> None:
    with pytest.raises(DataError, match="nothing was scored"):
        resampled_sums(np.empty((0, 2)))

"""Percentile bootstrap over independent units (pictures, as a rule): 95 % intervals of any statistic.

A resample is a vector of counts, so that a statistic of summed per-picture quantities is one matrix product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radio.errors import DataError

# Letters: R resamples, N units.

RESAMPLES = 1000


def resamples(count: int, *, seed: int = 0, draws: int = RESAMPLES) -> NDArray[np.float64]:
    """[R, N]: how often each of `count` units stands in each resample; every row sums to `count`.

    Raises:
        DataError: no units.
    """
    if count < 1:
        raise DataError("nothing was scored, so there is no interval; at least one picture is needed")
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of a statistic's values [R] over the resamples, NaN left out."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)

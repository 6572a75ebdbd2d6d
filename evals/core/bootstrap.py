"""Percentile bootstrap over independent units (images, as a rule): 95 % intervals of any statistic.

A resample is a vector of counts, so a statistic of summed per-image quantities is one matrix product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radio.errors import DataError

# Letters: R resamples, N units.

RESAMPLES = 1000


def resamples(count: int, *, seed: int = 0, draws: int = RESAMPLES) -> NDArray[np.float64]:
    """Draw resamples [R, N]: how often each of `count` units occurs in each; every row sums to `count`.

    Raises:
        DataError: no units.
    """
    if count < 1:
        raise DataError("nothing was scored, so there is no interval; at least one image is needed")
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the 2.5th and 97.5th percentiles of a statistic over the resamples [R], ignoring NaN."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)

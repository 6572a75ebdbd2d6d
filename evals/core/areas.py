"""From areas of classes to IoU and accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Letters: C classes.

Values = NDArray[np.float64]


def area_ratios(total: Values) -> tuple[Values, Values, Values]:
    """IoU [..., C], accuracy [..., C] and overall accuracy [...] in percent; NaN for a class that is absent.

    Args:
        total: [..., 3, C], pixels of each class in the intersection, in the prediction and in the label.
    """
    intersection, predicted, label = (total[..., place, :] for place in range(3))
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = 100 * intersection / (predicted + label - intersection)
        acc = 100 * intersection / label
        overall = 100 * intersection.sum(axis=-1) / label.sum(axis=-1)
    return iou, acc, overall


def mean_present(values: Values) -> Values:
    """Means over the last axis without NaN; NaN where there is nothing else (a resample of void pictures)."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Values = np.where(there, values, 0).sum(axis=-1) / there.sum(axis=-1)
    return mean

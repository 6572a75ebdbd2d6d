"""Statistics of scores: accuracies, areas of classes, and their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radio.errors import DataError

from .report import Metric

if TYPE_CHECKING:
    from torch import Tensor

# Letters: Q queries.


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion (E. B. Wilson 1927), by default at 95 %.

    Unlike the normal approximation it stays inside [0, 1] and holds for small counts and for 0 and 100 %.

    Raises:
        DataError: no trials.
    """
    if count < 1 or not 0 <= successes <= count:
        raise DataError(
            f"{successes} successes in {count} trials have no interval; at least one trial is needed"
        )
    share = successes / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def proportion(successes: float, count: int) -> Metric:
    """Compute a percentage with Wilson's interval.

    Raises:
        DataError: no trials.
    """
    low, high = wilson(successes, count)
    return Metric(value=100 * successes / count, low=100 * low, high=100 * high)


# Letters: N images, C classes, H W pixels.

Values = NDArray[np.float64]

_MAX_CLASSES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class AreaScores:
    """Segmentation scores in percent; NaN for an absent class."""

    miou: float
    macc: float
    aacc: float
    iou: Values  # [C]
    acc: Values  # [C]
    areas: Values  # [3, C], pixels of each class in the intersection, the prediction and the label


def areas(
    prediction: ArrayLike | Tensor,
    truth: ArrayLike | Tensor,
    *,
    num_classes: int | None = None,
    ignore: int | None = 255,
) -> AreaScores:
    """Compare two label maps as `radio-eval seg` does: mIoU, mean and overall accuracy, IoU of each class.

    Args:
        prediction: [H, W], or [..., H, W] of several images, which are scored together: the class of every
            pixel as an integer from 0.
        truth: the same for the labels; of the same shape.
        num_classes: C (default: the highest class in either map, plus one).
        ignore: pixels with this label in `truth` are ignored, whatever their prediction. None keeps all.

    Returns:
        The scores. A class that is in neither map is excluded from the means; one that is only predicted has
        an IoU of 0 and no accuracy. For images of several sizes, pass the stacked `areas` of each to `score`.

    Raises:
        DataError: maps of other types or unequal shapes, a class below 0 or beyond `num_classes`, or no pixel
            with a class.
    """
    predicted, label = _label_map(prediction, "prediction"), _label_map(truth, "truth")
    if predicted.shape != label.shape:
        raise DataError(
            f"the prediction is {list(predicted.shape)} and the truth {list(label.shape)}; give both a class "
            f"for every pixel of the same images"
        )
    if ignore is not None:
        scored = label != ignore
        predicted, label = predicted[scored], label[scored]
    if not label.size:
        raise DataError("no pixel has a class, so there is nothing to score")
    highest = max(int(predicted.max()), int(label.max()))
    count = highest + 1 if num_classes is None else num_classes
    if not 1 <= count <= _MAX_CLASSES:
        raise DataError(f"{count:,} classes; wanted 1 to {_MAX_CLASSES:,}, numbered from 0 on")
    for name, values in (("prediction", predicted), ("truth", label)):
        if not 0 <= int(values.min()) <= int(values.max()) < count:
            foreign = next(int(value) for value in (values.min(), values.max()) if not 0 <= value < count)
            raise DataError(
                f"the {name} holds the class {foreign}; wanted 0 to {count - 1}, or as the truth's label "
                f"{ignore} where a pixel is not to be scored"
            )
    rows = (predicted[predicted == label], predicted, label)
    total = np.stack([np.bincount(row.reshape(-1).astype(np.int64), minlength=count) for row in rows])
    return score(total[None].astype(np.float64))


def score(areas: Values) -> AreaScores:
    """Compute the scores over all images from the areas [N, 3, C] of each.

    A class that is neither labelled nor predicted is excluded from the means; one that is only predicted has
    an IoU of 0 and no accuracy. Sums are in float64: those of MMSegmentation, in float32, lose single pixels
    beyond 2^24.

    Raises:
        DataError: no pixel has a class.
    """
    total = areas.sum(axis=0)
    if not total[2].any():
        raise DataError("no validation pixel has a class, so there is nothing to score")
    iou, acc, overall = area_ratios(total)
    return AreaScores(
        miou=float(np.nanmean(iou)),
        macc=float(np.nanmean(acc)),
        aacc=float(overall),
        iou=iou,
        acc=acc,
        areas=total,
    )


def area_ratios(total: Values) -> tuple[Values, Values, Values]:
    """Compute IoU [..., C], accuracy [..., C] and overall accuracy [...] in percent; NaN for an absent class.

    Args:
        total: [..., 3, C], pixels of each class in the intersection, the prediction and the label.
    """
    intersection, predicted, label = (total[..., place, :] for place in range(3))
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = 100 * intersection / (predicted + label - intersection)
        acc = 100 * intersection / label
        overall = 100 * intersection.sum(axis=-1) / label.sum(axis=-1)
    return iou, acc, overall


def mean_present(values: Values) -> Values:
    """Average over the last axis without NaN; NaN where all are NaN (a resample of void images)."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Values = np.where(there, values, 0).sum(axis=-1) / there.sum(axis=-1)
    return mean


def _label_map(values: ArrayLike | Tensor, what: str) -> NDArray[Any]:
    from torch import Tensor  # seconds, which scorers of texts do not need

    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the {what} is no array ({error}); wanted whole numbers [H, W]") from error
    if array.dtype.kind not in "biu":
        raise DataError(f"the {what} holds {array.dtype}; wanted whole numbers, the class of each pixel")
    if array.ndim < 2:
        raise DataError(f"the {what} is {list(array.shape)}; wanted [H, W], or [N, H, W]")
    return array


# Letters: R resamples, N units.

_RESAMPLES = 1000
_CELLS = 1 << 20  # of the resamples in memory at once: 8 MB


def resamples(count: int, *, seed: int = 0) -> Iterator[Values]:
    """Yield 1,000 resamples in blocks [r, N]: how often each of `count` units occurs; rows sum to `count`.

    Raises:
        DataError: no units.
    """
    if count < 1:
        raise DataError("nothing was scored, so there is no interval; at least one image is needed")
    generator = np.random.default_rng(seed)
    size = max(1, _CELLS // count)
    for start in range(0, _RESAMPLES, size):
        draws = (generator.integers(0, count, count) for _ in range(start, min(start + size, _RESAMPLES)))
        yield np.stack([np.bincount(draw, minlength=count) for draw in draws]).astype(np.float64)


def resampled_sums(values: Values, *, seed: int = 0) -> Values:
    """Sum values [N, ...] over the units of each resample: [R, ...].

    Raises:
        DataError: no units.
    """
    flat = values.reshape(len(values), -1) if values.size else values
    sums = np.concatenate([weights @ flat for weights in resamples(len(values), seed=seed)])
    return sums.reshape(-1, *values.shape[1:])


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Compute the 2.5th and 97.5th percentiles of a statistic over the resamples [R], ignoring NaN."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)

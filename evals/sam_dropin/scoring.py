"""Scores of masks: overlaps without run lengths, by size and category, with intervals over images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evals.core.bootstrap import interval, resamples
from evals.core.report import Metric, Table

from .bits import count, erode, pack

# Letters: N masks, H W pixels, R bytes per column; in the statistics R resamples.

_SMALL, _LARGE = 32**2, 96**2  # pixels; an area equal to a limit belongs to both sizes, as in COCOeval
_BOUNDARY = 0.02  # of the diagonal (B. Cheng et al. 2021)


class Record(NamedTuple):
    """The scores of one instance."""

    image_id: int
    annotation_id: int
    category_id: int
    area: float
    crowd: bool
    quality: float  # the IoU that the decoder predicts
    iou: float
    boundary_iou: float
    box_iou: float  # of the filled box


def overlap(one: Tensor, other: Tensor, bias: float = 0.0) -> Tensor:
    """Compute intersection / (union + bias) of bit masks, [N, R, W] each: [N] float64; 0 for two empty."""
    both = count(one & other)
    either = count(one) + count(other) - both
    return both / (either + bias).clamp(min=1e-9)


def boundaries(bits: Tensor, size: tuple[int, int]) -> Tensor:
    """Select mask pixels at most 2 % of the diagonal from the mask's edge: bits [N, R, W] -> [N, R, W].

    As in Boundary IoU: the mask minus the mask eroded by 3 x 3 once for each pixel of that distance; pixels
    beyond the image of `size` = (H, W) are outside every mask.
    """
    return bits & ~erode(bits, max(round(_BOUNDARY * math.hypot(*size)), 1))


def fill(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Fill boxes [N, 4] as x0 y0 x1 y1: bits [N, R, W] of the pixels whose centres lie inside."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    down, across = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    return pack(down[:, :, None]) & across[:, None, :].to(torch.uint8) * 255


def metrics(records: Sequence[Record], seed: int) -> dict[str, Metric]:
    """Compute mIoU in percent over all instances and by size, boundary mIoU, and mIoU of the filled boxes.

    Sizes are defined by the annotation's area; a size without instances is omitted. Intervals are bootstraps
    over images.
    """
    images = np.unique([record.image_id for record in records], return_inverse=True)[1]
    weights = resamples(int(images.max()) + 1, seed=seed)
    areas = np.array([record.area for record in records])
    ious = np.array([record.iou for record in records])
    chosen: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {
        "miou": (ious, np.ones(len(records), dtype=bool)),
        "miou_small": (ious, areas <= _SMALL),
        "miou_medium": (ious, (areas >= _SMALL) & (areas <= _LARGE)),
        "miou_large": (ious, areas >= _LARGE),
        "boundary_miou": (np.array([r.boundary_iou for r in records]), np.ones(len(records), dtype=bool)),
        "filled_box_miou": (np.array([r.box_iou for r in records]), np.ones(len(records), dtype=bool)),
    }
    return {
        name: _mean(values[kept], images[kept], weights)
        for name, (values, kept) in chosen.items()
        if kept.any()
    }


def category_table(records: Sequence[Record], categories: Mapping[int, str]) -> Table:
    """Tabulate the categories among the records: name, number of instances, and mIoU in percent."""
    ious: dict[int, list[float]] = {number: [] for number in categories}
    for record in records:
        ious[record.category_id].append(record.iou)
    rows = tuple(
        (categories[number], len(found), 100 * sum(found) / len(found))
        for number, found in ious.items()
        if found
    )
    return Table(columns=("category", "instances", "miou"), rows=rows)


def _mean(values: NDArray[np.float64], images: NDArray[np.int64], weights: NDArray[np.float64]) -> Metric:
    """Compute the mean over instances and its bootstrap interval over images; `weights` is [R, images]."""
    count = weights.shape[1]
    sums = np.bincount(images, weights=values, minlength=count)
    counts = np.bincount(images, minlength=count).astype(np.float64)
    with np.errstate(invalid="ignore"):  # resamples without an instance of this size are omitted
        low, high = interval((weights @ sums) / (weights @ counts))
    return Metric(value=100 * float(values.mean()), low=100 * low, high=100 * high)

"""mIoU, mAcc and aAcc from areas per image, with intervals over images."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evals.core.areas import area_ratios, mean_present, score
from evals.core.bootstrap import interval, resamples
from evals.core.report import Metric, Table

# Letters: N images, C classes, R resamples.

Areas = NDArray[np.float64]
"""[N, 3, C]: pixels per image and class in the intersection, in the prediction and in the label."""


def metrics(areas: Areas, seed: int = 0) -> dict[str, Metric]:
    """Compute miou, macc and aacc with 95 % intervals: percentile bootstrap over images."""
    scores = score(areas)
    counts = resamples(len(areas), seed=seed)  # [R, N]
    totals = (counts @ areas.reshape(len(areas), -1)).reshape(len(counts), *areas.shape[1:])
    iou, acc, overall = area_ratios(totals)
    drawn = {"miou": mean_present(iou), "macc": mean_present(acc), "aacc": overall}
    found = {}
    for name, values in drawn.items():
        low, high = interval(values)
        found[name] = Metric(value=getattr(scores, name), low=low, high=high)
    return found


def area_records(areas: Areas, keys: Sequence[str]) -> str:
    """Format a line of JSON per image: its key, and [class, intersection, prediction, label] in pixels.

    Contains the classes that are predicted or in the label; the sums over all lines give the scores.
    """
    lines = []
    for key, of_classes in zip(keys, areas.astype(int), strict=True):
        seen = np.flatnonzero(of_classes[1] + of_classes[2])
        rows = np.column_stack([seen, of_classes[:, seen].T]).tolist()
        lines.append(json.dumps({"image": key, "areas": rows}, ensure_ascii=False) + "\n")
    return "".join(lines)


def repeated(runs: Sequence[Areas]) -> dict[str, Metric]:
    """Compute the mean scores of several heads, with their standard deviation (n - 1)."""
    found = [score(areas) for areas in runs]
    values = {name: torch.tensor([getattr(one, name) for one in found]) for name in ("miou", "macc", "aacc")}
    return {
        name: Metric(value=float(value.double().mean()), std=float(value.double().std()))
        for name, value in values.items()
    }


def class_table(runs: Sequence[Areas], classes: tuple[str, ...]) -> Table:
    """Tabulate per class IoU and accuracy in percent (means over heads), and the share of labelled pixels."""
    found = [score(areas) for areas in runs]
    iou, acc = (np.mean([getattr(one, name) for one in found], axis=0) for name in ("iou", "acc"))
    pixels = runs[0].sum(axis=0)[2]
    share = 100 * pixels / pixels.sum()
    rows = tuple(
        (name, _or_none(iou[place]), _or_none(acc[place]), float(share[place]))
        for place, name in enumerate(classes)
    )
    return Table(columns=("class", "iou", "acc", "share"), rows=rows)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

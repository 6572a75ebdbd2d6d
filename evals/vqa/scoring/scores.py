"""The score of every question, and metrics and tables computed from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.core.bootstrap import RESAMPLES, interval, resamples
from evals.core.report import Metric, Table

from .exam import Grouping

# Letters: Q questions, P images, K groups, R resamples.

_CELLS = 16_000_000  # of the resamples in memory at a time: 128 MB; VQAv2 has forty thousand images


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The score of each answer, in the order of the questions."""

    ids: tuple[str, ...]
    values: tuple[float, ...]  # 0 to 1; a question without a prediction has 0
    images: tuple[str, ...]  # of each question: questions about one image are resampled together
    groups: Mapping[str, Grouping]
    missing: tuple[str, ...]  # ids of the questions without a prediction

    def metrics(self, seed: int = 0) -> dict[str, Metric]:
        """Compute `accuracy` in percent, overall and per group (`answer_type_yes_no`), and any `unanswered`.

        Intervals are 95 % bootstraps over images.
        """
        masks = {"accuracy": np.ones(len(self.ids), dtype=bool)}
        for name, group in self.groups.items():
            if group.as_metrics:
                labels = np.array(group.labels)
                for label in sorted(set(group.labels)):
                    key = f"{name}_{_slug(label)}"
                    while key in masks:  # another label has the same slug
                        key += "_"
                    masks[key] = labels == label
        metrics = self._means(masks, seed)
        if self.missing:
            share = 100 * len(self.missing) / len(self.ids)
            metrics["unanswered"] = Metric(value=share, higher_is_better=False)
        return metrics

    def tables(self) -> dict[str, Table]:
        """Build a table for each grouping: group, number of questions, accuracy in percent."""
        values = np.array(self.values)
        tables = {}
        for name, group in self.groups.items():
            labels = np.array(group.labels)
            rows = tuple(
                (label, int((labels == label).sum()), 100 * float(values[labels == label].mean()))
                for label in sorted(set(group.labels))
            )
            tables[name] = Table(columns=(name.replace("_", " "), "questions", "accuracy"), rows=rows)
        return tables

    def _means(self, masks: dict[str, NDArray[np.bool_]], seed: int) -> dict[str, Metric]:
        values = np.array(self.values)
        _, images = np.unique(self.images, return_inverse=True)
        number = int(images.max()) + 1 if len(values) else 0
        columns = list(masks.values())
        sums: NDArray[np.float64] = np.stack(
            [np.bincount(images, values * mask, number) for mask in columns], axis=1
        )
        counts: NDArray[np.float64] = np.stack(
            [np.bincount(images, mask, number) for mask in columns], axis=1
        )
        drawn = _ratios(sums, counts, seed)
        found = {}
        for place, (name, mask) in enumerate(masks.items()):
            low, high = interval(drawn[:, place])
            mean = float(values[mask].mean())
            found[name] = Metric(value=100 * mean, low=100 * low, high=100 * high)
        return found


def mean_accuracy(benchmarks: Sequence[Scores], seed: int = 0) -> Metric:
    """Compute the mean of the benchmarks' accuracies in percent; shared images are resampled together."""
    _, images = np.unique([name for one in benchmarks for name in one.images], return_inverse=True)
    ends = np.cumsum([len(one.images) for one in benchmarks])
    number, drawn = int(images.max()) + 1, np.split(images, ends[:-1])
    pairs = list(zip(drawn, benchmarks, strict=True))
    sums: NDArray[np.float64] = np.stack([np.bincount(of, one.values, number) for of, one in pairs], axis=1)
    counts = np.stack([np.bincount(of, minlength=number) for of, _ in pairs], axis=1).astype(np.float64)
    low, high = interval(_ratios(sums, counts, seed).mean(axis=1))
    mean = np.mean([np.mean(one.values) for one in benchmarks])
    return Metric(value=100 * float(mean), low=100 * low, high=100 * high)


def _ratios(sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Compute bootstrap means [R, K]: sums [P, K] over counts [P, K], both summed over resampled images."""
    step = max(1, min(RESAMPLES, _CELLS // max(1, len(sums))))
    parts = []
    for start in range(0, RESAMPLES, step):
        draws = min(step, RESAMPLES - start)
        weights = resamples(len(sums), seed=seed + (start << 32), draws=draws)
        with np.errstate(invalid="ignore"):  # NaN of a resample without a question of a group: ignored
            parts.append((weights @ sums) / (weights @ counts))
    return np.concatenate(parts)


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")

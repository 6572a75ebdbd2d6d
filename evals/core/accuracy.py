"""Accuracies of ranked classes with confidence intervals, overall and per class."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .report import Metric, Table, proportion

# Letters: Q queries.

_Z = 1.959964  # 95 %


def top_accuracies(ranking: Tensor, labels: Tensor, num_classes: int, suffix: str = "") -> dict[str, Metric]:
    """Compute `top1` and `top5` in percent with their intervals; top-5 is omitted below five classes.

    Args:
        ranking: [Q, 5] classes, the best first; -1 is no prediction.
        labels: [Q].
        suffix: appended to the metrics' names.

    Raises:
        DataError: no queries.
    """
    hits = ranking == labels.unsqueeze(1)
    metrics = {f"top1{suffix}": proportion(int(hits[:, 0].sum()), len(labels))}
    if num_classes >= 5:
        metrics[f"top5{suffix}"] = proportion(int(hits.any(1).sum()), len(labels))
    return metrics


def mean_class(ranking: Tensor, labels: Tensor) -> Metric:
    """Compute the mean recall over the classes, in percent, with a normal interval.

    The variance of each class follows Agresti and Coull (1998), with two successes and two failures added, so
    that a class that is always right still counts as uncertain.
    """
    rows = _by_class(ranking, labels)
    value = sum(correct / count for _, count, correct in rows) / len(rows)
    shares = [((correct + 2) / (count + 4), count + 4) for _, count, correct in rows]
    half = _Z * math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(rows)
    return Metric(value=100 * value, low=100 * max(0.0, value - half), high=100 * min(1.0, value + half))


def class_table(ranking: Tensor, labels: Tensor, classes: Sequence[str]) -> Table:
    """Tabulate every class among the queries: name, queries, correct ones, and their share in percent."""
    rows = tuple(
        (classes[place], count, correct, 100 * correct / count)
        for place, count, correct in _by_class(ranking, labels)
    )
    return Table(columns=("class", "count", "correct", "top1"), rows=rows)


def confusion_table(ranking: Tensor, labels: Tensor, classes: Sequence[str], most: int = 50) -> Table:
    """Tabulate the `most` most frequent confusions.

    Each row has the class, the predicted class, the count, and its share of the class's queries in percent.
    Equally frequent ones are in the order of the classes.
    """
    wrong = ranking[:, 0] != labels
    pairs = labels[wrong] * len(classes) + ranking[wrong, 0]
    found, counts = pairs.unique(return_counts=True)  # ascending
    order = counts.argsort(descending=True, stable=True)[:most]
    totals = labels.bincount(minlength=len(classes))
    rows = []
    for pair, count in zip(found[order].tolist(), counts[order].tolist(), strict=True):
        label, taken = divmod(pair, len(classes))
        rows.append((classes[label], classes[taken], count, 100 * count / int(totals[label])))
    return Table(columns=("class", "taken for", "count", "share"), rows=tuple(rows))


def _by_class(ranking: Tensor, labels: Tensor) -> list[tuple[int, int, int]]:
    """Return (class, count, correct) of each class among the queries."""
    right = (ranking[:, 0] == labels).double()
    counts = labels.bincount()
    correct = labels.bincount(weights=right)
    return [(place, int(counts[place]), int(correct[place])) for place in counts.nonzero().flatten().tolist()]

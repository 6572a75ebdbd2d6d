"""Report parts of evaluators that classify images: accuracies, classes, confusions, and wrong predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from radio.data import ImageSource
from radio.errors import RadioError

from .blocks import Confusions, Example, Examples, Image, Table
from .evaluator import EvalRun
from .report import Metric
from .stats import proportion

# Letters: Q queries.

_Z = 1.959964  # 95 %
_MOST_CONFUSIONS = 500
_WRONG = 6  # misclassified images that are shown


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
        (classes[label], count, correct, 100 * correct / count)
        for label, count, correct in _by_class(ranking, labels)
    )
    columns = ("class", "count", "correct", "top1")
    return Table(title="top-1 of each class", columns=columns, rows=rows, compared="top1", shared="count")


def confusions(ranking: Tensor, labels: Tensor, classes: Sequence[str]) -> Confusions:
    """List the most frequent confusions; equally frequent ones are in the order of the classes."""
    predicted = ranking[:, 0]
    wrong = (predicted != labels) & (predicted >= 0)
    pairs = labels[wrong] * len(classes) + predicted[wrong]
    unique, counts = pairs.unique(return_counts=True)  # ascending
    order = counts.argsort(descending=True, stable=True)[:_MOST_CONFUSIONS]
    rows = []
    for pair, count in zip(unique[order].tolist(), counts[order].tolist(), strict=True):
        label, prediction = divmod(pair, len(classes))
        rows.append((classes[label], classes[prediction], count))
    return Confusions(title="confusions", rows=tuple(rows))


def wrong_examples(
    run: EvalRun,
    source: ImageSource,
    indices: Tensor,
    ranking: Tensor,
    labels: Tensor,
    confidence: Tensor,
    classes: Sequence[str],
    *,
    title: str,
    details: Callable[[int], tuple[str, ...]] = lambda row: (),
    others: Callable[[int], tuple[Image, ...]] = lambda row: (),
) -> list[Examples]:
    """Show misclassified images, the most confident first, one for each pair of classes; empty without any.

    Args:
        indices: [Q] of the queries in the source.
        ranking: [Q, 5] classes, the best first; -1 is no prediction.
        labels: [Q].
        confidence: [Q].
        details: further lines about a query, by its row.
        others: images beside a query's, by its row.
    """
    wrong = ((ranking[:, 0] != labels) & (ranking[:, 0] >= 0)).nonzero().flatten()
    chosen: dict[tuple[int, int], int] = {}
    for row in wrong[confidence[wrong].argsort(descending=True, stable=True)].tolist():
        chosen.setdefault((int(labels[row]), int(ranking[row, 0])), row)
    examples = []
    for (label, prediction), row in list(chosen.items())[:_WRONG]:
        index = int(indices[row])
        key = source.keys[index]
        lines = (f"{classes[label]}, taken for {classes[prediction]}", key, *details(row))
        image = source_image(run, source, index, classes[label])
        examples.append(Example(image=image, lines=lines, others=others(row), good=False))
    return [Examples(title=title, examples=tuple(examples))] if examples else []


def source_image(
    run: EvalRun, source: ImageSource, index: int, name: str, *, label: str = "", good: bool | None = None
) -> Image | None:
    """Save a source's image for the page; None if it cannot be read any more."""
    try:
        pixels = source.read(index)
    except RadioError:
        return None
    return run.save_image(pixels, f"{source.keys[index]}: {name}", shown=56, label=label, good=good)


def _by_class(ranking: Tensor, labels: Tensor) -> list[tuple[int, int, int]]:
    """Return (class, count, correct) of each class among the queries."""
    right = (ranking[:, 0] == labels).to(torch.float64)
    counts = labels.bincount()
    correct = labels.bincount(weights=right)
    return [(label, int(counts[label]), int(correct[label])) for label in counts.nonzero().flatten().tolist()]

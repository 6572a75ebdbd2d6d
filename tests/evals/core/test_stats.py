from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score

from evals.core.classification import class_table, confusions, mean_class, top_accuracies
from evals.core.stats import wilson
from radio.errors import DataError

RANKING = torch.tensor([[0, 1, 2, 3, 4], [1, 0, -1, -1, -1], [2, 1, 0, 4, 3], [-1, -1, -1, -1, -1]])
LABELS = torch.tensor([0, 0, 3, 3])
NAMES = ("a", "b", "c", "d", "e")


def test_top_accuracies_by_hand() -> None:
    metrics = top_accuracies(RANKING, LABELS, 5, "_x")
    assert (metrics["top1_x"].value, metrics["top5_x"].value) == (25.0, 75.0)
    low, high = wilson(1, 4)
    assert (metrics["top1_x"].low, metrics["top1_x"].high) == (100 * low, 100 * high)
    assert list(top_accuracies(RANKING, LABELS, 4)) == ["top1"]
    with pytest.raises(DataError, match="at least one trial"):
        top_accuracies(RANKING[:0], LABELS[:0], 5)


def test_the_class_table_lists_what_was_asked_for() -> None:
    table = class_table(RANKING, LABELS, NAMES)
    assert table.columns == ("class", "count", "correct", "top1")
    assert table.rows == (("a", 2, 1, 50.0), ("d", 2, 0, 0.0))


@pytest.fixture
def many() -> tuple[torch.Tensor, torch.Tensor]:
    """600 queries of 7 classes, some of them rare, right about every second time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 49, (600,), generator=generator).sqrt().long()
    guesses = torch.randint(0, 7, (600, 5), generator=generator)
    lucky = torch.rand(600, generator=generator) < 0.5
    guesses[lucky, 0] = labels[lucky]
    return guesses, labels


def test_the_mean_over_classes_is_scikit_learns_macro_recall(many: tuple[torch.Tensor, torch.Tensor]) -> None:
    ranking, labels = many
    metric = mean_class(ranking, labels)
    assert metric.value == pytest.approx(100 * recall_score(labels, ranking[:, 0], average="macro"))
    assert metric.low is not None and metric.high is not None
    assert metric.low < metric.value < metric.high


def test_its_interval_is_as_wide_as_a_bootstraps(many: tuple[torch.Tensor, torch.Tensor]) -> None:
    ranking, labels = many
    generator = np.random.default_rng(0)
    right = (ranking[:, 0] == labels).numpy()
    means = [
        np.mean([generator.choice(right[labels == c], int((labels == c).sum())).mean() for c in range(7)])
        for _ in range(400)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    metric = mean_class(ranking, labels)
    assert metric.low is not None and metric.high is not None
    assert metric.high - metric.low == pytest.approx(100 * (high - low), rel=0.15)


def test_classes_that_are_always_right_are_still_uncertain() -> None:
    metric = mean_class(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert metric.value == 100 == metric.high
    assert metric.low is not None and metric.low < 75


def test_the_commonest_confusions_come_first(many: tuple[torch.Tensor, torch.Tensor]) -> None:
    ranking, labels = many
    names = tuple("abcdefg")
    block = confusions(ranking, labels, names)
    matrix = confusion_matrix(labels, ranking[:, 0], labels=range(7))
    expected = sorted(
        (
            (names[i], names[j], int(matrix[i, j]))
            for i in range(7)
            for j in range(7)
            if i != j and matrix[i, j]
        ),
        key=lambda row: (-row[2], row[0], row[1]),
    )
    assert list(block.rows) == expected

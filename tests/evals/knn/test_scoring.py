from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals.core.report import wilson
from evals.knn.classify import choose
from evals.knn.scoring import accuracies, real_accuracy, repeated
from radio.errors import DataError

RANKING = torch.tensor([[0, 1, 2, 3, 4], [1, 0, -1, -1, -1], [2, 1, 0, 4, 3], [-1, -1, -1, -1, -1]])
LABELS = torch.tensor([0, 0, 3, 3])


def test_accuracies_by_hand() -> None:
    metrics = accuracies({10: RANKING.flip(0), 20: RANKING}, LABELS, num_classes=5, headline=20)
    assert list(metrics) == ["top1", "top5", "top1_k10", "top5_k10", "mean_class"]
    assert metrics["top1"].value == 25.0
    assert metrics["top5"].value == 75.0
    assert metrics["mean_class"].value == 25.0  # half of class 0, nothing of class 3
    low, high = wilson(1, 4)
    assert (metrics["top1"].low, metrics["top1"].high) == (100 * low, 100 * high)


def test_top5_is_absent_below_five_classes() -> None:
    assert "top5" not in accuracies({20: RANKING}, LABELS, num_classes=4, headline=20)


def test_the_mean_over_classes_weighs_small_classes_alike() -> None:
    labels = torch.tensor([0] * 9 + [1])
    ranking = torch.zeros(10, 5, dtype=torch.int64)
    metrics = accuracies({20: ranking}, labels, num_classes=2, headline=20)
    assert metrics["top1"].value == 90.0
    assert metrics["mean_class"].value == 50.0


def test_tries_have_a_mean_and_a_spread() -> None:
    assert repeated([10.0, 20.0, 30.0]).value == 20.0
    assert repeated([10.0, 20.0, 30.0]).std == pytest.approx(10.0)
    assert repeated([10.0]).std is None


def test_several_accepted_labels(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[4, 0], [0], [], [1]]))
    keys = [f"n01/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3, 4)]
    metric = real_accuracy(RANKING, keys, path)
    assert metric.value == pytest.approx(100 / 3)  # the first is right; the third accepts nothing
    # The name's number decides, not the order.
    assert real_accuracy(RANKING[:2].flip(0), [keys[1], keys[0]], path).value == 50.0
    path.write_text(json.dumps({"x": [0], "y.png": [1], "d/z.png": [0], "w": [0]}))
    named = real_accuracy(RANKING, ["d/x.png", "d/y.png", "d/z.png", "w.png"], path)
    assert named.value == 50.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[0]]", "does not end in a number from 1 to that"),
        ('{"other": [1]}', "has no entry for"),
        ("[0, 1]", "lists of class numbers"),
        ('[["a"]]', "lists of class numbers"),
        ("3", "lists of class numbers"),
        ("{", "not JSON"),
        ("[[], [], [], []]", "accepts no label"),
        (None, "no such file"),
    ],
)
def test_bad_files_of_accepted_labels_are_errors(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "real.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=said):
        real_accuracy(RANKING, ["a1.png", "a2.png", "a3.png", "a4.png"], path)


def test_few_shot_takes_n_of_each_class_and_the_try_decides_which() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 2)
    indices = torch.arange(102) * 3
    draws = [choose(indices, labels, 5, attempt) for attempt in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    for chosen in draws:
        assert torch.equal(chosen, chosen.sort().values)
        assert labels[chosen // 3].bincount().tolist() == [5, 5, 2]

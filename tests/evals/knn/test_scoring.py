from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.core.report import Metric
from evals.core.stats import wilson
from evals.knn.evaluator import accuracies, choose, mean_of_tries, read_accepted
from evals.knn.evaluator import real_accuracy as accuracy_of
from radio.errors import DataError

RANKING = torch.tensor([[0, 1, 2, 3, 4], [1, 0, -1, -1, -1], [2, 1, 0, 4, 3], [-1, -1, -1, -1, -1]])
LABELS = torch.tensor([0, 0, 3, 3])


def test_accuracies_by_hand() -> None:
    metrics = accuracies({10: RANKING.flip(0), 20: RANKING}, LABELS, num_classes=5, main_k=20)
    assert list(metrics) == ["top1", "top5", "top1_k10", "top5_k10", "mean_class"]
    assert metrics["top1"].value == 25.0
    assert metrics["top5"].value == 75.0
    assert metrics["mean_class"].value == 25.0  # half of class 0, nothing of class 3
    low, high = wilson(1, 4)
    assert (metrics["top1"].low, metrics["top1"].high) == (100 * low, 100 * high)


def test_top5_is_absent_below_five_classes() -> None:
    assert "top5" not in accuracies({20: RANKING}, LABELS, num_classes=4, main_k=20)


def test_the_mean_over_classes_weighs_small_classes_alike() -> None:
    labels = torch.tensor([0] * 9 + [1])
    ranking = torch.zeros(10, 5, dtype=torch.int64)
    metrics = accuracies({20: ranking}, labels, num_classes=2, main_k=20)
    assert metrics["top1"].value == 90.0
    assert metrics["mean_class"].value == 50.0


def test_tries_have_a_mean_and_a_spread() -> None:
    assert mean_of_tries([10.0, 20.0, 30.0]).value == 20.0
    assert mean_of_tries([10.0, 20.0, 30.0]).std == pytest.approx(10.0)
    assert mean_of_tries([10.0]).std is None


def real_accuracy(
    ranking: torch.Tensor, keys: list[str], path: Path, classes: tuple[str, ...] = tuple("abcde")
) -> Metric:
    return accuracy_of(ranking, read_accepted(path, keys, classes))


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
        ('{"a1": [0], "a1": [1]}', "'a1'"),
        ('{"caf\\u00e9": [0], "cafe\\u0301": [1]}', "how their accents are written"),
        ("[[-1], [0], [0], [0]]", "greater than or equal to 0"),
        ("[[true], [0], [0], [0]]", "lists of class numbers.*valid integer"),
        ("[[0.0], [0], [0], [0]]", "lists of class numbers.*valid integer"),
        ("[[" + "1" * 5000 + "]]", "not JSON"),
        ("[[9223372036854775808], [0], [0], [0]]", "lists of class numbers"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "lists of class numbers"),
        ("[[NaN]]", "NaN"),
        ("[[5], [0], [0], [0]]", "the bank has 5 classes and .* accepts 5; class numbers need all 6 folders"),
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


SYNSETS = ("n01440764", "n02123045", "n07753592")  # ImageNet's classes 0, 281 and 954


@pytest.mark.parametrize("classes", [SYNSETS, ("0", "281", "954"), ("000", "281", "954")])
def test_a_part_of_imagenets_classes_has_imagenets_numbers(tmp_path: Path, classes: tuple[str, ...]) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[0], [281, 5], [954], [1, 2]]), encoding="utf-8-sig")
    keys = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3, 4)]
    ranking = torch.tensor([[0], [1], [2], [1]])
    assert real_accuracy(ranking, keys, path, classes).value == 75.0
    assert real_accuracy(ranking.roll(1, 0), keys, path, classes).value == 0.0


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("tench", "tabby", "banana"), "the bank has 3 classes and .* accepts 954"),
        (("n01440764", "n02123045", "n99999999"), "the bank has 3 classes and .* accepts 954"),
        (("1", "01", "954"), "several classes of one number"),
    ],
)
def test_classes_whose_numbers_cannot_be_known(tmp_path: Path, classes: tuple[str, ...], said: str) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[0], [281], [954]]))
    with pytest.raises(DataError, match=said):
        read_accepted(path, ["1", "2", "3"], classes)


def test_numbers_in_names_that_are_sorted_as_text_may_mean_either(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[number] for number in range(12)]))
    keys = [f"{number}.png" for number in range(1, 13)]
    with pytest.raises(
        DataError, match="class_0, class_1, class_10, class_11, … by their letters and class_0"
    ):
        read_accepted(path, keys, sorted(f"class_{number}" for number in range(12)))
    padded = read_accepted(path, keys, [f"class_{number:02d}" for number in range(12)])
    assert padded == [frozenset([number]) for number in range(12)]


def test_two_images_do_not_share_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text("[[0], [1]]")
    with pytest.raises(DataError, match=r"c0/1\.png and c1/1\.png would both have its entry 1"):
        read_accepted(path, ["c0/1.png", "c0/2.png", "c1/1.png"], "ab")
    path.write_text('{"x": [0], "d/x.png": [1]}')
    assert read_accepted(path, ["x.png", "d/x.png"], "ab") == [frozenset([0]), frozenset([1])]
    with pytest.raises(DataError, match="would both have its entry x"):
        read_accepted(path, ["x.png", "e/x.png"], "ab")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(), st.sampled_from(["a1", "x", "é"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a1", "a2", "é", "e\u0301"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(data=JSON, cut=st.integers(0, 3), mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff"]))
def test_any_file_gives_accepted_classes_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any, cut: int, mark: bytes
) -> None:
    path = tmp_path_factory.mktemp("real") / "real.json"
    text = json.dumps(data).encode()
    path.write_bytes(mark + text[: len(text) - cut])
    try:
        found = read_accepted(path, ["a1.png", "a2.png"], "ab")
    except DataError as error:
        assert "real.json" in str(error)  # noqa: PT017
    else:
        assert len(found) == 2 and any(found)

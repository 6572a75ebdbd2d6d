from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.features import Extraction, ViewSettings, extract, make_view
from evals.core.task import make_evaluator
from evals.knn import KnnSettings
from evals.knn.index import knn
from radio.data import open_source
from radio.errors import DataError, RadioError

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(6) * 10 + 7, 10)  # classes that are no places
CENTRES = RNG.normal(size=(80, 5))
BANK = CENTRES[LABELS] + RNG.normal(size=(60, 5))
QUERY_LABELS = np.tile(np.arange(6) * 10 + 7, 4)
QUERIES = CENTRES[QUERY_LABELS] + RNG.normal(size=(24, 5))


def slowly(k: int, *, alone: bool = False) -> np.ndarray:
    """The protocol as loops over queries and neighbours, in float64."""
    unit = BANK / np.linalg.norm(BANK, axis=1, keepdims=True)
    predictions = []
    for number, query in enumerate(BANK if alone else QUERIES):
        similarities = unit @ (query / np.linalg.norm(query))
        if alone:
            similarities[number] = -np.inf
        votes: dict[int, float] = {}
        for place in np.argsort(-similarities)[:k]:
            votes[LABELS[place]] = votes.get(LABELS[place], 0) + np.exp(similarities[place] / 0.07)
        predictions.append(max(votes, key=lambda label: (votes[label], -label)))
    return np.array(predictions)


@pytest.mark.parametrize("made", [np.asarray, torch.tensor, lambda array: array.tolist()])
def test_it_equals_the_protocol_as_loops(made: Callable[[Any], Any]) -> None:
    found = knn(made(BANK), made(LABELS), made(QUERIES), made(QUERY_LABELS), k=(1, 5, 60))
    for k in (1, 5, 60):
        assert found.predictions[k].tolist() == slowly(k).tolist()
        assert found.accuracies[k] == pytest.approx(100 * (slowly(k) == QUERY_LABELS).mean())
    assert 30 < found.accuracies[5] < 100
    alone = knn(made(BANK), made(LABELS), k=3)
    assert alone.predictions[3].tolist() == slowly(3, alone=True).tolist()


def test_classes_may_be_texts() -> None:
    texts, query_texts = (
        np.char.add("class ", LABELS.astype(str)),
        np.char.add("class ", QUERY_LABELS.astype(str)),
    )
    found = knn(BANK, texts, QUERIES, query_texts, k=5)
    assert found.predictions[5].tolist() == [f"class {label}" for label in slowly(5)]


def test_it_gives_the_evaluators_own_numbers(
    tmp_path: Path, make_folder: Callable[..., Path], backbone: Callable[..., Any]
) -> None:
    bank = make_folder(tmp_path / "train", classes=5, count=6)
    query = make_folder(tmp_path / "val", classes=5, count=4, first=100)
    asked = KnnSettings(bank=str(bank), query=str(query), k=(3, 7), primary_k=7)
    model = backbone()
    report = run_evaluator(
        make_evaluator("knn"), model, asked, tmp_path / "out", run=RunSettings(cache=tmp_path / "cache")
    )
    how = Extraction(view=make_view(model, ViewSettings())[0], device=torch.device("cpu"))
    sources = [open_source(str(folder)) for folder in (bank, query)]
    sides = [extract(model, source, how, cache=tmp_path / "cache").load().features for source in sources]
    found = knn(sides[0], sources[0].labels, sides[1], sources[1].labels, k=(3, 7))
    assert found.accuracies == {
        7: report.metrics["top1"].value,
        3: report.metrics["top1_k3"].value,
    }


WITH_NAN = np.where(np.arange(300).reshape(60, 5) == 152, np.nan, BANK)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((WITH_NAN, LABELS), "features: row 30 is not finite"),
        ((BANK, LABELS, np.full((2, 5), np.inf), [7, 7]), "queries: row 0 is not finite"),
        ((BANK[:, 0], LABELS), "wanted one row"),
        ((BANK[:0], LABELS[:0]), "wanted one row"),
        ((BANK, LABELS[:-1]), r"labels: shape \[59\] for 60 rows"),
        ((BANK, LABELS + 0.5), "wanted whole numbers or texts"),
        ((BANK, LABELS, QUERIES), "give both, or neither"),
        ((BANK, LABELS, QUERIES[:, :4], QUERY_LABELS), "queries of width 4 do not fit features of width 5"),
        (
            (BANK, LABELS, QUERIES, QUERY_LABELS + 1),
            r"6 classes that labels lack, the first is .*8.*from .*7.* to .*57",
        ),
        ((BANK, LABELS, QUERIES, QUERY_LABELS.astype(str)), "give both alike"),
        (([["a"]], [1]), "features: no array of numbers"),
        (([[1, 2], [3]], [1, 2]), "features: no array of numbers"),
        ((BANK.astype(complex), LABELS), "real numbers"),
    ],
)
def test_what_is_no_such_array_is_an_error(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(DataError, match=said):
        knn(*arguments, k=3)


@pytest.mark.parametrize("k", [0, 61, -1, (), (5, 61), 2.5, "many", [[1]], float("nan")])
def test_a_k_that_cannot_be(k: Any) -> None:
    with pytest.raises(DataError, match="k = "):
        knn(BANK, LABELS, QUERIES, QUERY_LABELS, k=k)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_gives_no_weights(temperature: float) -> None:
    with pytest.raises(DataError, match="gives no weights"):
        knn(BANK, LABELS, QUERIES, QUERY_LABELS, k=5, temperature=temperature)


ANYTHING = st.one_of(
    st.none(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-3, 3), max_size=4),
    st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), max_size=4),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ANYTHING, min_size=2, max_size=4), st.one_of(st.integers(-1, 5), ANYTHING))
def test_any_arrays_give_numbers_or_one_error(arrays: list[Any], k: Any) -> None:
    try:
        found = knn(*arrays, k=k)
    except RadioError:
        return
    assert all(0 <= value <= 100 for value in found.accuracies.values())

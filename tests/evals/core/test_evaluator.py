from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.core.evaluator import (
    EvalRun,
    Evaluator,
    Result,
    RunSettings,
    domain_notes,
    evaluators,
    run_evaluator,
)
from evals.core.report import Metric
from evals.core.task import make_evaluator
from radio.data import open_source
from radio.dist import Ranks
from radio.errors import ConfigError
from radio.image_files import StoredImages
from radio.types import Backbone


class Trained:
    """A backbone with metadata (only what the notes look at)."""

    def __init__(self, *sources: dict[str, Any]) -> None:
        self.metadata = {"data": {"sources": list(sources)}}


def notes(model: Any, *texts: str) -> tuple[str, ...]:
    found: Backbone = model
    return domain_notes(found, [open_source(text, scenes=4) for text in texts])


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ("d/train", "is the same place as"),
        ("d/val", "is a split of the same data set as"),
        ("d", "lies within"),
        ("d/train/c0", "contains"),
        ("other", ""),
        ("d-train", ""),
    ],
)
def test_notes_on_folders(tmp_path: Path, make_folder: Callable[..., Path], trained: str, said: str) -> None:
    make_folder(tmp_path / "d" / "train")
    make_folder(tmp_path / "d" / "val", first=50)
    entry = {"path": str(tmp_path / trained), "fingerprint": "?", "labels_used": False}
    found = notes(Trained(entry), str(tmp_path / "d" / "train"))
    assert len(found) == bool(said)
    assert all(note.startswith("in-domain: d/train ") and said in note for note in found)
    assert all("without labels" in note for note in found)


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_wait_until_the_leading_one_has_hashed(
    rank: int, tmp_path: Path, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing ImageNet takes an hour: eight ranks on one disk must not do it at once."""
    events: list[str] = []
    hash_content = StoredImages._hash_content

    def hashed(images: StoredImages) -> str:
        events.append("hashed")
        return hash_content(images)

    def gather(ranks: Ranks, value: Any) -> list[Any]:
        events.append("met")
        if ranks.leads:
            return [value]
        return [(open_source(str(root), memo=memo).fingerprint, None)]  # what the leading one does meanwhile

    root, memo = make_folder(tmp_path / "d"), tmp_path / "cache" / "fingerprints"
    monkeypatch.setattr(StoredImages, "_hash_content", hashed)
    monkeypatch.setattr(Ranks, "gather_objects", gather)
    settings = RunSettings(cache=tmp_path / "cache", device="cpu")
    run = EvalRun(settings, base="x", folder=tmp_path, ranks=Ranks(rank, 2))
    source = run.open_images(str(root))
    run.note_source(source)
    assert events == (["hashed", "met"] if rank == 0 else ["met", "hashed"])
    assert run.sources == {source.fingerprint: source}
    assert events.count("hashed") == 1  # rank 1 has read the memo


def test_the_same_images_elsewhere_are_in_domain(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    one, two = make_folder(tmp_path / "one"), make_folder(tmp_path / "two")
    entry = {"path": str(two), "fingerprint": open_source(str(two)).fingerprint, "labels_used": True}
    (note,) = notes(Trained(entry), str(one))
    assert "holds the same images as" in note
    assert "with labels" in note


def test_the_generated_world_is_one_domain() -> None:
    entry = {"path": "scenes:train?seed=2", "fingerprint": "?", "labels_used": False}
    assert len(notes(Trained(entry), "scenes:train", "scenes:val")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 10**9}, "batch_size: "),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 10**26}, "seed: "),
        ({"workers": -1}, "workers: -1"),
        ({"limit": -3}, "limit: -3"),
    ],
)
def test_run_settings_out_of_range_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSettings(**changes)


@dataclass(frozen=True)
class Plain:
    """Settings of an evaluator of another package."""

    order: int = 2


@dataclass(frozen=True)
class Taken:
    """Settings with a name that every evaluator has."""

    seed: int = 2


GOOD = Result(metrics={"h": Metric(value=1.0)})


def evaluator(returned: Any, **changes: Any) -> Evaluator[Any]:
    return Evaluator(**{"name": "odd", "settings": Plain, "evaluate": lambda *_: returned, **changes})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (evaluator(GOOD), "its entry point is a Evaluator, wanted a function that makes an Evaluator"),
        (lambda: 5, "its factory gave a int, wanted an evals.core.evaluator.Evaluator"),
        (
            lambda: evaluator(GOOD, name="knn"),
            "it calls itself 'knn'; give the evaluator the name of its entry",
        ),
        (lambda: evaluator(GOOD, settings=dict), "its settings are no dataclass"),
        (lambda: evaluator(GOOD, settings=Taken), "its setting seed is one that every evaluator has"),
    ],
)
def test_an_entry_point_that_is_no_evaluator_is_one_line(
    monkeypatch: pytest.MonkeyPatch, entry: Any, message: str
) -> None:
    monkeypatch.setitem(evaluators._entries, "odd", entry)
    with pytest.raises(ConfigError, match=message):
        make_evaluator("odd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {}}, "a Result without metrics"),
        ({"metrics": {"h": 1.0}}, r"metrics\['h'\] is a float, wanted a Metric"),
        ({"metrics": {"h": Metric(value=float("nan"))}}, "odd: its evaluate gave a Result .*value"),
        ({"baselines": {"chance": torch.ones(1)}}, "odd: its evaluate gave a Result that no report can hold"),
        ({"blocks": [Plain()]}, "odd: its evaluate gave a Result that no report can hold: blocks"),
        ({"records": [{"score": 1}]}, "record 0 has no id"),
        ({"records": [{"id": 1}, {"id": 1}]}, "record 1 has the id of another"),
        (
            {"records": [{"id": 1, "score": 7}]},
            r"record 0 \(1\) has the score 7; wanted a number from 0 to 1",
        ),
        ({"records": [{"id": 1, "x": torch.ones(1)}]}, r"record 0 \(1\) is no JSON: .*Tensor"),
    ],
)
def test_a_result_that_no_report_can_hold_is_one_line_and_leaves_nothing(
    tmp_path: Path, backbone: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_evaluator(evaluator(replace(GOOD, **changes)), backbone(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_card_or_data_has_no_notes() -> None:
    model = Trained()
    model.metadata = {}
    assert notes(model, "scenes:val") == ()

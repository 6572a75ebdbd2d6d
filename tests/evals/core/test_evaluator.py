from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.core.evaluator import RunSettings, domain_notes
from radio.data import open_source
from radio.errors import ConfigError
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


def test_a_model_without_a_card_or_data_has_no_notes() -> None:
    model = Trained()
    model.metadata = {}
    assert notes(model, "scenes:val") == ()

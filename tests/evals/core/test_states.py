from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.core.states import load_state, save_state
from radio.dist import Ranks
from radio.errors import CheckpointError, DataError


@dataclass(frozen=True, kw_only=True)
class State:
    """A training."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    notes: list[dict[str, Any]] = field(default_factory=list)


STATE = State(
    step=3,
    weights={"w": torch.arange(6.0).bfloat16(), "none": torch.empty(0), "one": torch.tensor(True)},
    rates=(1e-3, float("nan")),
    notes=[{"a": None, "b": [1, "x"]}],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_state(tmp_path / "s.pt", "kind/1", "key", STATE)
    return tmp_path / "s.pt"


def read(path: Path) -> State:
    return load_state(path, "kind/1", "key", State())


def test_it_comes_back(path: Path) -> None:
    found = read(path)
    assert (found.step, repr(found.rates), found.notes) == (3, repr(STATE.rates), STATE.notes)
    assert all(torch.equal(found.weights[name], STATE.weights[name]) for name in STATE.weights)


def _change(**changes: Any) -> Callable[[Path], object]:
    """Write the same file with other content."""

    def change(path: Path) -> None:
        found = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in {**found, **changes}.items() if value != "absent"}, path)

    return change


def _foreign(**changes: Any) -> Callable[[Path], object]:
    """Write a state of another shape, with a checksum that fits."""

    def change(path: Path) -> None:
        state = State(**{**vars(STATE), **changes})
        save_state(path, "kind/1", "key", state)

    return change


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.find(torch.arange(6.0).bfloat16().view(torch.uint8).numpy().tobytes())
    data[place + 3] ^= 64
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-90]),
    "empty": lambda path: path.write_bytes(b""),
    "a head alone": lambda path: path.write_bytes(b"PK\x03\x04"),
    "no step": _change(step="absent"),
    "another step": _change(step=4),
    "no checksum": _change(checksum="absent"),
    "meta": _change(weights={"w": torch.empty(3, device="meta")}),
    "sparse": _change(weights={"w": torch.eye(3).to_sparse()}),
    "a step of text": _foreign(step="3"),
    "weights of numbers": _foreign(weights={"w": 3}),
    "weights by number": _foreign(weights={3: torch.ones(1)}),
    "rates of text": _foreign(rates=("x",)),
    "a folder": _folder,
    "a pipe": _pipe,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_one_error(path: Path, damage: str) -> None:
    DAMAGES[damage](path)
    with pytest.raises(CheckpointError, match=r"s\.pt: not a training, or a damaged one; remove it"):
        read(path)


@pytest.mark.parametrize("content", [[1], {"format": "kind/1"}, {"format": "kind/2"}, torch.ones(2)])
def test_what_is_no_such_state_is_one_error(path: Path, content: Any) -> None:
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="to begin anew"):
        read(path)


def test_a_missing_state_is_the_fresh_one(tmp_path: Path) -> None:
    assert read(tmp_path / "none.pt") == State()


def test_another_trainings_state_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="of another backbone, data set or protocol; remove it"):
        load_state(path, "kind/1", "other", State())


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "kind/1", "key": "key", "weights": _Evil()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=f"{name}: not a training, or a damaged one"):
            read(Path(name))
    assert not Path("ran").exists()


class _Apart(Ranks):
    """Two ranks, of which the other sees nothing."""

    def barrier(self) -> None:
        pass

    def gather(self, array: Tensor) -> Tensor:
        return torch.stack([array, torch.zeros_like(array)])


def test_ranks_that_do_not_share_a_folder_are_an_error(path: Path) -> None:
    with pytest.raises(DataError, match="ranks see different states; give --cache a folder that all share"):
        load_state(path, "kind/1", "key", State(), _Apart(0, 2))

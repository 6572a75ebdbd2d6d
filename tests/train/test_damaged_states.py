"""States that somebody damaged, or wrote: left aside with the reason, never a crash, never in the way."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from safetensors.torch import save_file

from radio.dist import Ranks
from radio.errors import CheckpointError, RadioError
from train.checkpoints import CheckpointManager
from train.monitor import MetricMeans, MetricMeansState, NonFiniteMonitor, first_bad
from train.trainer import _NOTES

CPU = torch.device("cpu")


def open_states(out: Path, said: list[str] | None = None) -> CheckpointManager:
    tell = print if said is None else said.append
    return CheckpointManager(
        out / "state", Ranks(), {"steps": 9}, keep_last=2, keep_every=0, log=tell, schema=_NOTES
    )


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), float(value)), "count": torch.tensor(int(value))}


def notes() -> dict[str, Any]:
    guard, meters = NonFiniteMonitor(CPU), MetricMeans()
    guard.update(torch.tensor(False), [{"clip/spatial": torch.tensor(float("nan"))}])
    meters.add({"loss": torch.tensor(1.0)})
    return {
        "ranks": [{"meters": meters.state_dict(), "guard": guard.state_dict()}],
        "data": {"cursors": [], "counts": [0]},
    }


def write(states: CheckpointManager, step: int, value: float | None = None) -> None:
    states.write(step, tensors(step if value is None else value), notes(), lambda: None)
    states.wait(last=True)


def filled(out: Path) -> Path:
    """States of the steps 4 and 6; the folder of the newer one."""
    states = open_states(out)
    write(states, 4)
    write(states, 6)
    return out / "state" / "step-000006"


def shard_of(state: Path) -> Path:
    (file,) = state.glob("*.safetensors")
    return file


def resealed(state: Path) -> None:
    """Let run.json have the hashes of the files as they are now."""
    kept = json.loads((state / "run.json").read_text())
    kept["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in state.glob("*.safetensors")
    }
    (state / "run.json").write_text(json.dumps(kept))


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """What changes run.json."""

    def harm(state: Path) -> None:
        kept = json.loads((state / "run.json").read_text())
        change(kept)
        (state / "run.json").write_text(json.dumps(kept))

    return harm


def rewritten(**content: torch.Tensor) -> Callable[[Path], None]:
    """What replaces the tensors, with the right hash."""

    def harm(state: Path) -> None:
        save_file(content, shard_of(state))
        resealed(state)

    return harm


def with_bytes(data: bytes) -> Callable[[Path], None]:
    def harm(state: Path) -> None:
        shard_of(state).write_bytes(data)
        resealed(state)

    return harm


def as_link(target: str) -> Callable[[Path], None]:
    def harm(state: Path) -> None:
        file = shard_of(state)
        file.unlink()
        file.symlink_to(target)

    return harm


def text_of_notes(text: bytes) -> Callable[[Path], None]:
    return lambda state: (state / "run.json").write_bytes(text) and None


def a_file(state: Path) -> None:
    for file in state.iterdir():
        file.unlink()
    state.rmdir()
    state.write_text("x")


def notes_as_folder(state: Path) -> None:
    (state / "run.json").unlink()
    (state / "run.json").mkdir()


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "nested": (text_of_notes(b"[" * 100_000), "nested too deeply"),
    "many digits": (text_of_notes(b"1" * 5000), "run.json: is not JSON"),
    "not UTF-8": (text_of_notes(b"\xff\xfeab\xff"), "run.json"),
    "NaN": (text_of_notes(b'{"step": NaN}'), "it holds NaN"),
    "a folder": (notes_as_folder, "run.json: is a folder"),
    "a file": (a_file, "run.json: Not a directory"),
    "step -5": (changed(lambda kept: kept.update(step=-5)), "run.json: step: "),
    "step of another": (changed(lambda kept: kept.update(step=7)), "run.json is of step 7"),
    "settings []": (changed(lambda kept: kept.update(settings=[])), "run.json: settings: "),
    "no ranks": (changed(lambda kept: kept["notes"].pop("ranks")), "notes: ranks: field required"),
    "ranks []": (changed(lambda kept: kept["notes"].update(ranks=[])), "notes: ranks: "),
    "ranks 3": (changed(lambda kept: kept["notes"].update(ranks=3)), "notes: ranks: "),
    "no data": (changed(lambda kept: kept["notes"].pop("data")), "notes: data: field required"),
    "data 3": (changed(lambda kept: kept["notes"].update(data=3)), "notes: data: "),
    "data of another kind": (
        changed(lambda kept: kept["notes"]["data"].update(cursors=[[[[-1]]]])),
        "notes: data.cursors[0][0][0][0]: ",
    ),
    "guard 3": (changed(lambda kept: kept["notes"]["ranks"][0].update(guard=3)), "ranks[0].guard"),
    "guard of 2**70": (
        changed(lambda kept: kept["notes"]["ranks"][0]["guard"].update(total=2**70)),
        "ranks[0].guard",
    ),
    "meters 3": (changed(lambda kept: kept["notes"]["ranks"][0].update(meters=[3])), "ranks[0].meters"),
    "meters of another length": (
        changed(lambda kept: kept["notes"]["ranks"][0]["meters"].update(rows=[[["loss"], [1.0, 2.0, 3.0]]])),
        "wanted a sum for each name",
    ),
    "no files": (changed(lambda kept: kept.update(files={})), "run.json: files: "),
    "a device": (
        changed(lambda kept: kept["files"].update({"/dev/zero": "0" * 64})),
        "/dev/zero is there or in run.json, and not in both",
    ),
    "a link to a device": (as_link("/dev/zero"), "is no regular file"),
    "a link to nothing": (as_link("nothing"), "o such file"),
    "a pickle": (with_bytes(pickle.dumps({"a": 1})), "its files cannot be read"),
    "empty": (with_bytes(b""), "its files cannot be read"),
    "a giant header": (with_bytes(b"\xff" * 8 + b"{}"), "its files cannot be read"),
    "other names": (rewritten(b=torch.zeros(3, 2)), "it has no a"),
    "another shape": (
        rewritten(a=torch.zeros(2, 2), count=torch.tensor(1)),
        "a is [2, 2] torch.float32 in it",
    ),
    "another type": (
        rewritten(a=torch.zeros(3, 2).half(), count=torch.tensor(1)),
        "torch.float16 in it, not",
    ),
    "NaN in it": (
        rewritten(a=torch.full((3, 2), torch.nan), count=torch.tensor(1)),
        "a is not finite in it",
    ),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_damaged_state_is_left_aside_and_written_again(tmp_path: Path, kind: str) -> None:
    """As the last state of a run, too: what stands in its place must not block it."""
    harm, reason = HARM[kind]
    newest, said = filled(tmp_path), list[str]()
    harm(newest)
    states, into = open_states(tmp_path, said), tensors(0)
    found = states.resume(into)
    assert found is not None
    assert found.step == states.last_step == 4
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(4).items())
    (line,) = said
    assert line.startswith(f"{newest}: damaged, and left aside (")
    assert reason in line
    assert len(line) < 600
    write(states, 6, 5.0)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-000004", "step-000006"]
    again = open_states(tmp_path, said)
    found = again.resume(into)
    assert found is not None
    assert found.step == 6
    assert float(into["a"][0, 0]) == 5.0


@pytest.mark.parametrize("kind", ["nested", "other names", "NaN in it"])
def test_without_another_one_the_reason_is_the_error(tmp_path: Path, kind: str) -> None:
    harm, reason = HARM[kind]
    write(open_states(tmp_path), 6)
    harm(tmp_path / "state" / "step-000006")
    with pytest.raises(
        CheckpointError, match="not a whole training state; start again with --restart"
    ) as caught:
        open_states(tmp_path).resume(tensors(0))
    assert reason in str(caught.value)


def test_a_damaged_state_takes_no_place_among_those_kept_and_goes_in_time(tmp_path: Path) -> None:
    (filled(tmp_path) / "run.json").unlink()
    states = open_states(tmp_path, [])
    assert states.resume(tensors(0)) is not None
    write(states, 5)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "step-000004",
        "step-000005",
        "step-000006",
    ]
    write(states, 7)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-000005", "step-000007"]


@pytest.mark.parametrize("kind", ["file", "link", "dead link", "folder"])
def test_what_is_called_a_half_goes_whatever_it_is(tmp_path: Path, kind: str) -> None:
    filled(tmp_path)
    other, half = tmp_path / "other", tmp_path / "state" / "x.tmp"
    other.mkdir()
    (other / "mine.txt").touch()
    match kind:
        case "file":
            half.touch()
        case "link":
            half.symlink_to(other)
        case "dead link":
            half.symlink_to(tmp_path / "nothing")
        case _:
            half.mkdir()
    found = open_states(tmp_path).newest()
    assert found is not None
    assert found.step == 6
    assert not os.path.lexists(half)
    assert (other / "mine.txt").exists()


def test_clearing_removes_states_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "state" / "mine.txt").touch()
    (tmp_path / "state" / "step-x").mkdir()
    open_states(tmp_path).clear()
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["mine.txt", "step-x"]


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(CheckpointError, match="state: is no folder, and states go there"):
        open_states(tmp_path).newest()


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    good = {"a": torch.zeros(2), "n": torch.tensor(3), "none": torch.zeros(0)}
    assert first_bad(good) == first_bad({}) == ""
    for value in (torch.nan, torch.inf, -torch.inf):
        assert first_bad({**good, "b": torch.tensor([0.0, value]), "c": torch.tensor(value)}) == "b"


def test_meters_that_are_not_finite_come_back() -> None:
    first, second = MetricMeans(), MetricMeans()
    first.add({"loss": torch.tensor(torch.nan), "norm": torch.tensor(2.0)})
    plain = TypeAdapter(MetricMeansState).validate_python(
        json.loads(json.dumps(first.state_dict(), allow_nan=False))
    )
    second.load_state_dict(plain)
    assert str(second.read(Ranks())) == str(first.read(Ranks())) == "{'loss': nan, 'norm': 2.0}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key that it has."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in ((value, key), *_places(value[key]))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=JSON)
def test_anything_anywhere_in_the_notes_is_taken_or_told(tmp_path: Path, place: int, value: Any) -> None:
    newest = tmp_path / "state" / "step-000006"
    if not newest.exists():
        filled(tmp_path)
        (tmp_path / "kept.json").write_bytes((newest / "run.json").read_bytes())
    kept = copy.deepcopy(json.loads((tmp_path / "kept.json").read_text()))
    places = _places(kept)
    container, key = places[place % len(places)]
    container[key] = value
    (newest / "run.json").write_text(json.dumps(kept))
    try:
        found = open_states(tmp_path, []).resume(tensors(0))
    except RadioError:
        return
    assert found is not None
    if found.step == 6:
        rank = TypeAdapter(list[dict[str, Any]]).validate_python(found.notes["ranks"])[0]
        MetricMeans().load_state_dict(rank["meters"])
        NonFiniteMonitor(CPU).load_state_dict(rank["guard"])

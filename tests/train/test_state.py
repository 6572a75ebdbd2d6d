"""A state brings everything back, whoever wrote it, and refuses what is damaged or another run's."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from radio.dist import Ranks
from radio.errors import CheckpointError, RadioError
from train.checkpoints import CheckpointManager
from train.config import OptimConfig
from train.optim import GuardedAdamW, make_optimizer, moments

from .ranks import on_ranks

SETTINGS = {"steps": 9, "optim": {"lr": 0.1}}


def states(folder: Path, group: Ranks | None = None, **changes: Any) -> CheckpointManager:
    """Those of a run folder; `said.txt` in it keeps what they tell."""

    def tell(line: str) -> None:
        with (folder / "said.txt").open("a") as file:
            file.write(line + "\n")

    folder.mkdir(exist_ok=True)
    chosen = {"settings": SETTINGS, "keep_last": 2, "keep_every": 0, **changes}
    return CheckpointManager(folder / "state", group or Ranks(), log=tell, **chosen)


def said(folder: Path) -> str:
    path = folder / "said.txt"
    return path.read_text() if path.is_file() else ""


def tensors(value: float) -> dict[str, Tensor]:
    return {
        "weight": torch.full((3, 2), value),
        "none": torch.zeros(1, 0, 4),
        "count": torch.tensor(int(value)),
        "exact": torch.tensor(value, dtype=torch.float64) / 3,
    }


def write(
    kept: CheckpointManager, step: int, publish: Callable[[], None] = lambda: None, **notes: Any
) -> None:
    kept.write(step, tensors(step), notes, publish)
    kept.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def fresh(seed: int) -> tuple[nn.Module, GuardedAdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, make_optimizer(model, OptimConfig(lr=0.1))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), 0.3 + step)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def everything(model: nn.Module, optimizer: GuardedAdamW) -> dict[str, Tensor]:
    return {**model.state_dict(), **moments(optimizer, model)}


def test_model_and_optimiser_go_on_bit_for_bit(tmp_path: Path) -> None:
    first, second = fresh(0), fresh(1)
    advance(*first, 3)
    kept = states(tmp_path)
    kept.write(3, everything(*first), {"meters": [0.1, None]}, lambda: None)
    ends = [advance(*first, 4)]  # what is written are copies of what was there before
    kept.wait(last=True)
    again = states(tmp_path)
    found = again.newest()
    assert found is not None
    assert (found.step, found.notes) == (3, {"meters": [0.1, None]})
    again.read(found, everything(*second))
    ends.append(advance(*second, 4))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    write(states(tmp_path), 7)
    again, found = states(tmp_path), tensors(1)
    newest = again.newest()
    assert newest is not None
    again.read(newest, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(7).items())


def test_the_newest_few_and_every_so_many_are_kept(tmp_path: Path) -> None:
    kept = states(tmp_path, keep_every=4)
    for step in range(1, 10):
        write(kept, step)
    assert names(tmp_path) == ["step-000004", "step-000008", "step-000009"]
    other = states(tmp_path / "other", keep_last=1)
    for step in (999_999, 1_000_000):
        write(other, step)
    assert names(tmp_path / "other") == ["step-1000000"]


def test_there_is_nothing_at_first_and_after_clearing(tmp_path: Path) -> None:
    kept = states(tmp_path)
    assert kept.newest() is None
    write(kept, 1)
    kept.clear()
    assert kept.newest() is None


def test_another_runs_state_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(states(tmp_path / "run"), 3)
    yours = states(tmp_path / "run", settings={"steps": 9, "optim": {"lr": 0.2}})
    with pytest.raises(
        CheckpointError,
        match=r"run: holds a run with other settings \(optim.lr was 0.1 and is 0.2\); give another --out",
    ):
        yours.newest()


def test_settings_that_came_later_count_as_their_defaults(tmp_path: Path) -> None:
    old = {"steps": 9, "teachers": [{"name": "a"}, {"name": "b"}]}
    write(states(tmp_path / "run", settings=old), 3)
    defaults = {"teachers": {"mosaic": False}, "normalise": {"kind": "none"}, "gone": 1}
    now = {
        "steps": 9,
        "teachers": [{"name": "a", "mosaic": False}, {"name": "b", "mosaic": False}],
        "normalise": {"kind": "none"},
    }
    newest = states(tmp_path / "run", settings=now, defaults=defaults).newest()
    assert newest is not None and newest.step == 3
    for changed, message in (
        (
            {**now, "teachers": [now["teachers"][0], {"name": "b", "mosaic": True}]},
            r"teachers\[1\].mosaic was false",
        ),
        ({**now, "normalise": {"kind": "phi-s"}}, r'normalise.kind was "none" and is "phi-s"'),
        ({**now, "unknown": 1}, "unknown was null and is 1"),
        ({"steps": 9}, "teachers was"),
    ):
        with pytest.raises(CheckpointError, match=message):
            states(tmp_path / "run", settings=changed, defaults=defaults).newest()


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def harm(folder: Path, kind: str) -> None:
    """Damage a state in one way."""
    data, notes = next(folder.glob("*.safetensors")), folder / "run.json"
    match kind:
        case "truncated":
            data.write_bytes(data.read_bytes()[:-5])
        case "altered":
            data.write_bytes(data.read_bytes()[:-1] + b"!")
        case "pickle":
            data.write_bytes(pickle.dumps(Bomb()))
        case "no data":
            data.unlink()
        case "no notes":
            notes.unlink()
        case "half notes":
            notes.write_text(notes.read_text()[:40])
        case "other notes":
            notes.write_text('{"step": 2}')
        case "a list":
            notes.write_text("[1, 2]")


KINDS = ("truncated", "altered", "pickle", "no data", "no notes", "half notes", "other notes", "a list")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path, kind: str) -> None:
    kept = states(tmp_path)
    write(kept, 1)
    write(kept, 2)
    harm(tmp_path / "state" / "step-000002", kind)
    found = states(tmp_path).newest()
    assert found is not None
    assert found.step == 1
    assert said(tmp_path).startswith(f"{tmp_path / 'state' / 'step-000002'}: damaged, and left aside (")
    assert said(tmp_path).endswith(")\n")
    harm(tmp_path / "state" / "step-000001", kind)
    with pytest.raises(CheckpointError, match="not a whole training state; start again with --restart"):
        states(tmp_path).newest()


def test_a_half_written_state_is_none_and_goes(tmp_path: Path) -> None:
    write(states(tmp_path), 1)
    half = tmp_path / "state" / "step-000002.tmp"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"ha")
    found = states(tmp_path).newest()
    assert found is not None
    assert found.step == 1
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("where", ["fsync", "publish"])
def test_on_a_full_disk_the_old_state_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = states(tmp_path)
    write(kept, 4)
    with monkeypatch.context() as patch:
        if where == "fsync":
            patch.setattr(os, "fsync", full)
        write(kept, 5, full if where == "publish" else lambda: None)
        kept.write(6, tensors(6), {}, full)
        wanted = (
            r"the state of step 6 could not be written \(.*No space left on device\); that of step 4 stands"
        )
        with pytest.raises(RadioError, match=wanted):
            kept.wait(last=True)
    assert len(said(tmp_path).splitlines()) == 1
    assert "step 5 could not be written" in said(tmp_path)
    assert names(tmp_path) == ["step-000004"]
    write(kept, 7)
    assert names(tmp_path) == ["step-000004", "step-000007"]


def test_the_state_gets_its_name_after_what_is_published(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    write(states(tmp_path), 1, lambda: seen.append(names(tmp_path)))
    assert seen == [["step-000001.tmp"]]
    assert names(tmp_path) == ["step-000001"]
    assert json.loads((tmp_path / "state" / "step-000001" / "run.json").read_text())["settings"] == SETTINGS


def whole() -> dict[str, Tensor]:
    return {"a": torch.arange(20.0).reshape(5, 4), "mine": torch.ones(2)}


def spread(world: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    return {name: distribute_tensor(torch.zeros_like(t), mesh, [Shard(0)]) for name, t in whole().items()}


def test_ranks_write_their_parts_and_others_read_them(tmp_path: Path) -> None:
    """Spread over three ranks, with a tensor that one of them has alone; read whole, and by two."""

    def three(group: Ranks) -> None:
        mesh = init_device_mesh("cpu", (3,))
        have = {"a": distribute_tensor(whole()["a"], mesh, [Shard(0)])}
        if group.rank == 2:
            have["mine"] = whole()["mine"]
        kept = states(tmp_path / "run", group)
        kept.write(5, have, {}, lambda: None)
        kept.wait(last=True)
        group.barrier()  # the first rank names it

    def read(group: Ranks) -> dict[str, Tensor]:
        kept = states(tmp_path / "run", group)
        found = kept.newest()
        assert found is not None
        into = spread(2) if group.world == 2 else {n: torch.zeros_like(t) for n, t in whole().items()}
        kept.read(found, into)
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in into.items()}

    on_ranks(3, tmp_path / "three", three)
    assert len(list((tmp_path / "run" / "state" / "step-000005").glob("*.safetensors"))) == 3
    for found in (read(Ranks()), *on_ranks(2, tmp_path / "two", read)):
        assert all(torch.equal(found[name], tensor) for name, tensor in whole().items())
    (tmp_path / "run" / "state" / "step-000005" / "run.json").unlink()

    def refused(group: Ranks) -> str:
        with pytest.raises(CheckpointError) as error:
            states(tmp_path / "run", group).newest()
        return str(error.value)

    assert len(set(on_ranks(2, tmp_path / "refused", refused))) == 1

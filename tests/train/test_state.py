"""A saved state brings everything back, and refuses what is not its own."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from radio.errors import CheckpointError
from train.state import load_state, save_state


def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), 0.3 + step)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_model_and_optimiser_go_on_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.pt"
    first = fresh(0)
    advance(*first, 3)
    save_state(path, *first, 3, "mine", {"loss": (torch.tensor(1.5).double(), 2)})
    second = fresh(1)
    step, meters = load_state(path, *second, "mine")
    assert step == 3
    assert meters == {"loss": (torch.tensor(1.5).double(), 2)}
    ends = [advance(*pair, 4) for pair in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_another_runs_state_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.pt"
    save_state(path, *fresh(0), 3, "mine", {})
    model, optimizer = fresh(1)
    before = model.weight.detach().clone() if isinstance(model, nn.Linear) else None
    with pytest.raises(CheckpointError, match=r"run: holds a run with other settings; give another --out"):
        load_state(path, model, optimizer, "yours")
    assert isinstance(model, nn.Linear)
    assert before is not None
    assert torch.equal(model.weight, before)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "pickle"])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.pt"
    save_state(path, *fresh(0), 3, "mine", {})
    whole = path.read_bytes()
    content = {
        "text": b"not a state",
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "pickle": pickle.dumps(Bomb(), protocol=2),
    }
    path.write_bytes(content[kind])
    with pytest.raises(CheckpointError, match="not a whole training state; start again with --restart"):
        load_state(path, *fresh(1), "mine")


def test_a_foreign_torch_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="a torch file, but no training state"):
        load_state(path, *fresh(1), "mine")


def test_a_failed_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    save_state(path, *fresh(0), 3, "mine", {})
    before = path.read_bytes()

    def broken(source: object, target: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="the disk is full"):
        save_state(path, *fresh(0), 4, "mine", {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

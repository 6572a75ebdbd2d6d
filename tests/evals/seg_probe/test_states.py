from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from evals.seg_probe.states import HeadState, read_state, write_state
from radio.dist import Group
from radio.errors import CheckpointError, DataError

STATE = HeadState(
    iteration=7,
    head={"bn.weight": torch.arange(3.0)},
    optimizer={"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
    schedulers=[{"last_step": 7, "base_values": [1e-3]}],
)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(tmp_path / "a" / "state.pt", "key", STATE)
    found = read_state(tmp_path / "a" / "state.pt", "key")
    assert (found.iteration, found.schedulers) == (7, STATE.schedulers)
    assert torch.equal(found.head["bn.weight"], STATE.head["bn.weight"])
    assert found.optimizer["param_groups"] == STATE.optimizer["param_groups"]
    assert read_state(tmp_path / "none.pt", "key").iteration == 0


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path / "state.pt", "key", STATE)
    with pytest.raises(CheckpointError, match="of another backbone, data set or protocol; remove it"):
        read_state(tmp_path / "state.pt", "other")


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "am-radio-seg-head/1", "key": "key", "head": _Evil()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(_Evil()))
    Path("text.pt").write_text("no state")
    Path("cut.pt").write_bytes(Path("evil.pt").read_bytes()[:200])
    for name in ("evil", "raw", "text", "cut"):
        with pytest.raises(CheckpointError, match=f"{name}.pt: not a training, or a damaged one"):
            read_state(Path(f"{name}.pt"), "key")
    assert not Path("ran").exists()
    torch.save({"weights": torch.ones(1)}, "foreign.pt")
    with pytest.raises(CheckpointError, match="not of the format am-radio-seg-head/1"):
        read_state(Path("foreign.pt"), "key")


class _Apart(Group):
    """Two ranks, of which the other sees nothing."""

    def barrier(self) -> None:
        pass

    def gather(self, array):
        return torch.stack([array, torch.zeros_like(array)])


def test_ranks_that_do_not_share_a_folder_are_told(tmp_path: Path) -> None:
    write_state(tmp_path / "state.pt", "key", STATE)
    with pytest.raises(DataError, match="ranks see different states; give --cache a folder that all share"):
        read_state(tmp_path / "state.pt", "key", _Apart(0, 2))

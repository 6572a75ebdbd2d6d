"""A stage on disk: whole, only its own run's, never unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from evals.vqa.states import StageState, read_state, write_state
from radio.errors import CheckpointError


def test_a_state_comes_back(tmp_path: Path) -> None:
    state = StageState(
        step=3,
        weights={"w": torch.ones(2)},
        optimizer={"state": {"w": {"step": torch.tensor(3.0)}}},
        losses=(2.0, 1.5),
    )
    path = tmp_path / "s.pt"
    assert read_state(path, "k") == StageState()
    write_state(path, "k", state)
    found = read_state(path, "k")
    assert (found.step, found.losses, found.optimizer) == (3, (2.0, 1.5), state.optimizer)
    assert torch.equal(found.weights["w"], state.weights["w"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    write_state(path, "k", StageState(step=1))
    with pytest.raises(CheckpointError, match="is the training of another backbone, data set or protocol"):
        read_state(path, "other")
    torch.save({"format": "other"}, path)
    with pytest.raises(CheckpointError, match="not of the format am-radio-vqa-stage/1"):
        read_state(path, "k")
    path.write_bytes(pickle.dumps({"format": "am-radio-vqa-stage/1"}))
    with pytest.raises(CheckpointError, match="not a training, or a damaged one"):
        read_state(path, "k")

"""A stage's training on disk: what learns and nothing else, written whole, read without unpickling."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.core.dist import Group
from radio.config import write_bytes
from radio.errors import CheckpointError, DataError

_FORMAT = "am-radio-vqa-stage/1"
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageState:
    """Where a stage is; step 0 is one that has not begun."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)  # those that learn
    optimizer: dict[str, Any] = field(default_factory=dict)  # empty once the stage is done
    losses: tuple[float, ...] = ()  # of every step


def write_state(path: Path, key: str, state: StageState) -> None:
    """Write a state, atomically."""
    buffer = io.BytesIO()
    torch.save(
        {
            "format": _FORMAT,
            "key": key,
            "step": state.step,
            "weights": state.weights,
            "optimizer": state.optimizer,
            "losses": list(state.losses),
        },
        buffer,
    )
    write_bytes(path, buffer.getbuffer())


def read_state(path: Path, key: str, group: Group | None = None) -> StageState:
    """The state in a file, or a fresh one where there is no file; the same on every rank.

    Raises:
        CheckpointError: not a state, a damaged one, or one of another run.
        DataError: ranks do not share the folder.
    """
    group = group or Group()
    group.barrier()  # nobody reads while the leader still writes
    state = _read(path, key) if path.is_file() else StageState()
    steps = group.gather(torch.tensor(state.step))
    if int(steps.min()) != int(steps.max()):
        raise DataError(f"{path}: ranks see different states; give --cache a folder that all share")
    return state


def _read(path: Path, key: str) -> StageState:
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) != _ZIP:  # else torch would try to read a bare pickle
                raise EOFError
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a stage's training, or a damaged one; remove it to begin anew"
        ) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not of the format {_FORMAT}; remove it to begin anew")
    if found["key"] != key:
        raise CheckpointError(
            f"{path}: is the training of another backbone, data set or protocol; remove it to begin anew"
        )
    return StageState(
        step=found["step"],
        weights=found["weights"],
        optimizer=found["optimizer"],
        losses=tuple(found["losses"]),
    )

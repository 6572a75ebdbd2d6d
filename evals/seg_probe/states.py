"""A head's training on disk: written whole, read without unpickling, and only by its own run."""

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

_FORMAT = "am-radio-seg-head/1"
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadState:
    """Where a training is; iteration 0 is one that has not begun."""

    iteration: int = 0
    head: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedulers: list[dict[str, Any]] = field(default_factory=list)


def write_state(path: Path, key: str, state: HeadState) -> None:
    """Write a state, atomically."""
    buffer = io.BytesIO()
    torch.save(
        {
            "format": _FORMAT,
            "key": key,
            "iteration": state.iteration,
            "head": state.head,
            "optimizer": state.optimizer,
            "schedulers": state.schedulers,
        },
        buffer,
    )
    write_bytes(path, buffer.getvalue())


def read_state(path: Path, key: str, group: Group | None = None) -> HeadState:
    """The state in a file, or a fresh one where there is no file; the same on every rank.

    Raises:
        CheckpointError: not a state, a damaged one, or one of a run with other settings, data or weights.
        DataError: ranks do not share the folder.
    """
    group = group or Group()
    group.barrier()  # nobody reads while the leader still writes
    state = _read(path, key) if path.is_file() else HeadState()
    iterations = group.gather(torch.tensor(state.iteration))
    if int(iterations.min()) != int(iterations.max()):
        raise DataError(f"{path}: ranks see different states; give --cache a folder that all share")
    return state


def _read(path: Path, key: str) -> HeadState:
    try:
        data = path.read_bytes()
        if not data.startswith(_ZIP):  # else torch would try to read a bare pickle
            raise EOFError
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a head's training, or a damaged one; remove it to begin anew"
        ) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not of the format {_FORMAT}; remove it to begin anew")
    if found["key"] != key:
        raise CheckpointError(
            f"{path}: is the training of another backbone, data set or protocol; remove it to begin anew"
        )
    return HeadState(
        iteration=found["iteration"],
        head=found["head"],
        optimizer=found["optimizer"],
        schedulers=found["schedulers"],
    )

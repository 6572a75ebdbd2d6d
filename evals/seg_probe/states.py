"""The training state of a head on disk: written atomically, read without unpickling and only by its run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from evals.core.states import load_state, save_state
from radio.dist import Group

_FORMAT = "am-radio-seg-head/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadState:
    """The state of a training; iteration 0 means not started."""

    iteration: int = 0
    head: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedulers: list[dict[str, Any]] = field(default_factory=list)


def write_state(path: Path, key: str, state: HeadState) -> None:
    """Write a state atomically."""
    save_state(path, _FORMAT, key, state)


def read_state(path: Path, key: str, group: Group | None = None) -> HeadState:
    """Read the state in a file, or return a fresh one if it does not exist; the same on every rank.

    Raises:
        CheckpointError: not a state, a damaged one, or one of a run with other settings, data or weights.
        DataError: ranks do not share the folder.
    """
    return load_state(path, _FORMAT, key, HeadState(), group)

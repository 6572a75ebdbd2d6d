"""Training states on disk: only the trainable weights, written atomically, read without unpickling."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from evals.core.states import load_state, save_state
from radio.dist import Group

_FORMAT = "am-radio-vqa-stage/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageState:
    """The training state of a stage; step 0 has not started."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)  # the trainable ones
    optimizer: dict[str, Any] = field(default_factory=dict)  # empty once the stage is done
    losses: tuple[float, ...] = ()  # of every step


def write_state(path: Path, key: str, state: StageState) -> None:
    """Write a state, atomically."""
    save_state(path, _FORMAT, key, state)


def read_state(path: Path, key: str, group: Group | None = None) -> StageState:
    """Read a state from a file, or return a new one without a file; the same on every rank.

    Raises:
        CheckpointError: not a state, a damaged one, or one of a run with other settings, data or weights.
        DataError: ranks do not share the folder.
    """
    return load_state(path, _FORMAT, key, StageState(), group)

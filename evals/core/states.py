"""A training that is going on, on disk: written whole, read without unpickling, and only by its own run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from radio.config import write_bytes
from radio.errors import CheckpointError, DataError

from .dist import Group

_ZIP = b"PK\x03\x04"


def save_state(path: Path, kind: str, key: str, contents: Mapping[str, Any]) -> None:
    """Write tensors, numbers and plain containers, atomically.

    Args:
        kind: the format, with its version.
        key: of all that decides the training.
    """
    buffer = io.BytesIO()
    torch.save({"format": kind, "key": key, **contents}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(path: Path, kind: str, key: str) -> dict[str, Any]:
    """What was saved, on the CPU; empty where there is no file.

    Raises:
        CheckpointError: not such a file, a damaged one, or one of a run with other settings, data or weights.
    """
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) != _ZIP:  # else torch would try to read a bare pickle
                raise EOFError
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: not a training, or a damaged one; remove it to begin anew") from error
    if not isinstance(found, dict) or found.get("format") != kind:
        raise CheckpointError(f"{path}: not of the format {kind}; remove it to begin anew")
    if found["key"] != key:
        raise CheckpointError(
            f"{path}: is the training of another backbone, data set or protocol; remove it to begin anew"
        )
    return found


def check_agreed(path: Path, step: int, group: Group) -> None:
    """Nothing, when every rank has read the same step.

    Raises:
        DataError: they have not: they do not share the folder.
    """
    steps = group.gather(torch.tensor(step))
    if int(steps.min()) != int(steps.max()):
        raise DataError(f"{path}: ranks see different states; give --cache a folder that all share")

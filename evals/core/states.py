"""A training that is going on, on disk: written whole, read without unpickling, and only by its own run."""

from __future__ import annotations

import io
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from radio.errors import CheckpointError, DataError
from radio.io import write_bytes

from .dist import Group

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_ZIP = b"PK\x03\x04"


def save_state(path: Path, kind: str, key: str, state: DataclassInstance) -> None:
    """Write a state, atomically.

    Args:
        kind: the format, with its version.
        key: of all that decides the training.
        state: tensors, numbers and plain containers.
    """
    contents = {field.name: getattr(state, field.name) for field in fields(state)}
    buffer = io.BytesIO()
    torch.save({"format": kind, "key": key, **contents}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(path: Path, kind: str, key: str, fresh: S, group: Group | None = None) -> S:
    """The state in a file, on the CPU, or `fresh` where there is no file; the same on every rank.

    Args:
        kind: the format, with its version.
        key: of all that decides the training.
        fresh: a training that has not begun; its first field says how far one is.
        group: the ranks that read.

    Raises:
        CheckpointError: not such a file, a damaged one, or one of a run with other settings, data or weights.
        DataError: ranks do not share the folder.
    """
    group = group or Group()
    group.barrier()  # nobody reads while the leader still writes
    found = _read(path, kind, key)
    names = [field.name for field in fields(fresh)]
    state = replace(fresh, **{name: found[name] for name in names}) if found else fresh
    steps = group.gather(torch.tensor(getattr(state, names[0])))
    if int(steps.min()) != int(steps.max()):
        raise DataError(f"{path}: ranks see different states; give --cache a folder that all share")
    return state


def _read(path: Path, kind: str, key: str) -> dict[str, Any]:
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

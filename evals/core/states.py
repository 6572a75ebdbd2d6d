"""The state of a training on disk, written atomically and read without arbitrary unpickling."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from radio.chunks import Damage, DamagedError
from radio.dist import Ranks
from radio.errors import CheckpointError, DataError, shown
from radio.io import validate, write_bytes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_ZIP = b"PK\x03\x04"
# Errors that torch.load and tensors raise on damaged or foreign bytes.
_UNREADABLE = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(OSError, EOFError, MemoryError, pickle.UnpicklingError),
)


def save_state(path: Path, kind: str, key: str, state: DataclassInstance) -> None:
    """Write a state with a checksum, atomically.

    Args:
        kind: the format, with its version.
        key: a hash of everything that determines the training.
        state: tensors, numbers and plain containers.
    """
    contents = {field.name: getattr(state, field.name) for field in fields(state)}
    buffer = io.BytesIO()
    torch.save({"format": kind, "key": key, "checksum": _checksum(contents), **contents}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(path: Path, kind: str, key: str, fresh: S, group: Ranks | None = None) -> S:
    """Load the state in a file to the CPU, or return `fresh` if no file exists; the same on every rank.

    Args:
        kind: the format, with its version.
        key: a hash of everything that determines the training.
        fresh: the state before the training; its first field counts the progress.
        group: the ranks that read.

    Raises:
        CheckpointError: not such a file, a damaged one, or one of a run with other settings, data or weights.
        DataError: ranks do not share the folder.
    """
    group = group or Ranks()
    group.barrier()  # nobody reads while the leader still writes
    stored = _read(path, kind, key, fresh)
    state = replace(fresh, **stored) if stored else fresh
    steps = group.gather(torch.tensor(getattr(state, fields(fresh)[0].name)))
    if int(steps.min()) != int(steps.max()):
        raise DataError(f"{path}: ranks see different states; give --cache a folder that all share")
    return state


def resume_state(path: Path, kind: str, key: str, fresh: S, group: Ranks, damage: Damage) -> S:
    """Load the state as `load_state` does; one that cannot be used is recorded, and `fresh` returned.

    Args:
        damage: collects the damaged ones, for a note of the report.

    Raises:
        DataError: ranks do not share the folder.
    """
    try:
        return load_state(path, kind, key, fresh, group)
    except CheckpointError as error:
        if group.leads:
            damage.add(DamagedError(str(error).partition(";")[0]))
            if path.is_dir():  # a file cannot replace it
                shutil.rmtree(path)
        return fresh


def _read(path: Path, kind: str, key: str, fresh: DataclassInstance) -> dict[str, Any]:
    """Read the fields of a state; empty if no file exists."""
    if not path.exists():
        return {}
    damaged = f"{shown(path)}: not a training, or a damaged one; remove it to begin anew"
    try:
        stored = _load(path)
    except _UNREADABLE as error:
        raise CheckpointError(damaged) from error
    if not isinstance(stored, dict) or stored.get("format") != kind:
        raise CheckpointError(f"{shown(path)}: not of the format {kind}; remove it to begin anew")
    if stored.get("key") != key:
        raise CheckpointError(
            f"{shown(path)}: is the training of another backbone, data set or protocol; "
            f"remove it to begin anew"
        )
    contents = {field.name: stored.get(field.name) for field in fields(fresh)}
    try:
        fits = stored.get("checksum") == _checksum(contents)
    except _UNREADABLE as error:  # tensors without content, such as those on the device `meta`
        raise CheckpointError(damaged) from error
    if not fits:
        raise CheckpointError(f"{damaged} (its checksum does not fit its content)")
    hints = get_type_hints(type(fresh))
    for name, value in contents.items():
        schema = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
        validate(schema, value, f"{damaged} ({name})", error=CheckpointError)
    return contents


def _load(path: Path) -> Any:
    if not path.is_file():
        raise EOFError
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:  # otherwise torch would try to read a bare pickle
            raise EOFError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sparse tensors, which no state of ours has
        return torch.load(path, map_location="cpu", weights_only=True)


def _checksum(contents: Any) -> str:
    """Hash plain containers, numbers, texts and the bytes of tensors, in their order."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(f"{value.dtype} {list(value.shape)};".encode())
            sha.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            add([part for pair in value.items() for part in pair])
        elif isinstance(value, list | tuple):
            sha.update(f"{len(value)} values;".encode())
            for part in value:
                add(part)
        else:
            sha.update(f"{value!r};".encode())

    add(contents)
    return sha.hexdigest()

"""Work kept on disk in entries, one file each: ranks share them, and a killed run lacks only what is missing.

Every entry says what it should be: a checksum over its content and its place, and a schema that the reader
gives. One that is damaged, cut, foreign or of another shape is made again, and the report's notes say so.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter
from torch import Tensor

from radio.errors import DataError, RadioError, shown
from radio.io import MAX_DATA_BYTES, lines_of, read_text, validate, write_bytes, write_text

from .dist import Group

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # as `write_bytes` calls them
_DAY = 24 * 3600
_CHECKSUM = "checksum"  # its key in an entry's metadata or first line


class DamagedError(DataError):
    """An entry that is not what was written there; it can be made again."""


class TensorSpec(NamedTuple):
    """What a tensor of an entry has to be; None stands for any size, or for any shape."""

    dtype: torch.dtype
    shape: tuple[int | None, ...] | None


class Tensors(NamedTuple):
    """The content of an entry of tensors."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@final
class Damage:
    """Collects the damaged entries of a run, for the notes of its report."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def add(self, error: DamagedError) -> None:
        """Remember one."""
        self._reasons.append(str(error))

    def notes(self, group: Group | None = None) -> tuple[str, ...]:
        """A note on what all ranks found, the same on each; every rank asks. Empty where all was whole."""
        reasons = [reason for rank in (group or Group()).gather_objects(self._reasons) for reason in rank]
        if not reasons:
            return ()
        files = "file of the cache was" if len(reasons) == 1 else "files of the cache were"
        return (f"{len(reasons)} damaged {files} made again; the first: {reasons[0]}",)


def chunk_path(folder: Path, number: int, ending: str = "safetensors") -> Path:
    """The file of a chunk."""
    return folder / f"{number:06d}.{ending}"


def find_missing(paths: Sequence[Path], read: Callable[[Path], object], damage: Damage) -> list[int]:
    """The places in `paths` of the entries that have to be made: absent ones, and damaged ones.

    Args:
        read: gives an entry's content, or raises DamagedError.
        damage: learns of the damaged ones. Their files stay until they are replaced: another run in the
            same cache may just have done so.
    """
    for folder in {path.parent for path in paths}:
        remove_stray(folder)
    missing = []
    for place, path in enumerate(paths):
        if not path.exists():
            missing.append(place)
            continue
        try:
            read(path)
        except DamagedError as error:
            damage.add(error)
            missing.append(place)
            if path.is_dir():  # a file cannot replace it
                shutil.rmtree(path)
    return missing


def remove_stray(folder: Path) -> None:
    """Remove what killed runs left half-written in a folder of entries, more than a day ago."""
    for path in folder.glob(".*"):
        with suppress(OSError):  # another run may do the same
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def check_all_there(paths: Iterable[Path]) -> None:
    """Nothing, when every rank's chunks are in the folder.

    Raises:
        DataError: some are not: the ranks do not share it.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path.parent}: what other ranks made is not here; give --cache a folder that all share"
            )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an entry of tensors as safetensors with a checksum, atomically."""
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = dict(metadata or {})
    checksum = _checksum(path, kept, content)
    write_bytes(path, safetensors.torch.save(kept, metadata={**content, _CHECKSUM: checksum}))


def load_tensors(path: Path, names: Iterable[str]) -> Tensors:
    """Read some tensors of an entry that this run has checked or made.

    Raises:
        DamagedError: it has been damaged since.
    """
    return _load(path, names)


def read_tensors(path: Path, specs: Mapping[str, TensorSpec]) -> Tensors:
    """Read an entry of tensors and check it.

    Raises:
        DamagedError: it is not what `write_tensors` wrote at this place, or does not fit the specs.
    """
    content = _load(path)
    checksum = content.metadata.pop(_CHECKSUM, None)
    if checksum != _checksum(path, *content):
        raise DamagedError(f"{shown(path)}: its checksum does not fit its content")
    for name in content.tensors.keys() | specs.keys():
        if name not in specs or name not in content.tensors:
            raise DamagedError(f"{shown(path)}: holds {sorted(content.tensors)}, wanted {sorted(specs)}")
        tensor, spec = content.tensors[name], specs[name]
        sizes_fit = spec.shape is None or (
            len(tensor.shape) == len(spec.shape)
            and all(wanted in (None, size) for size, wanted in zip(tensor.shape, spec.shape, strict=True))
        )
        if tensor.dtype != spec.dtype or not sizes_fit:
            raise DamagedError(f"{shown(path)}: {name} is {tensor.dtype} {list(tensor.shape)}")
    return content


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write an entry of JSON records, one a line behind a line with their checksum, atomically."""
    body = "".join(json.dumps(record) + "\n" for record in records)
    write_text(path, json.dumps({_CHECKSUM: _text_checksum(path, body)}) + "\n" + body)


def read_records(path: Path, schema: TypeAdapter[T]) -> list[T]:
    """Read an entry of JSON records; lists become the tuples that the schema asks for.

    Raises:
        DamagedError: it is not what `write_records` wrote at this place, or a record does not fit the schema.
    """
    text = read_text(path, limit=MAX_DATA_BYTES, error=DamagedError)
    first, _, body = text.partition("\n")
    if first != json.dumps({_CHECKSUM: _text_checksum(path, body)}):
        raise DamagedError(f"{shown(path)}: its checksum does not fit its content")
    records = [json.loads(line) for line in lines_of(body)]  # our own, says the checksum
    return [validate(schema, record, path, error=DamagedError, strict=False) for record in records]


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there with a header that fits its length."""
    try:
        _load(path, ())
    except DamagedError:
        return False
    return True


def _load(path: Path, names: Iterable[str] | None = None) -> Tensors:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DamagedError(f"{shown(path)}: is no regular file")
        with safetensors.safe_open(path, framework="pt") as file:
            chosen = file.keys() if names is None else names
            # Copies: what is mapped changes when somebody writes into the file.
            tensors = {name: file.get_tensor(name).clone() for name in chosen}
            return Tensors(tensors, dict(file.metadata() or {}))
    except RadioError:
        raise
    # What safetensors and torch raise at a foreign header is of many types.
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{shown(path)}: is cut, damaged, or no such entry ({error})") from error


def _checksum(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over tensors, metadata, and the last names of the path: no entry can stand for another."""
    sha = hashlib.sha256(json.dumps([*path.parts[-2:], sorted(metadata.items())]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _text_checksum(path: Path, body: str) -> str:
    return hashlib.sha256(json.dumps([*path.parts[-2:], body]).encode()).hexdigest()

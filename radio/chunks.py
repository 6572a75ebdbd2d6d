"""Intermediate results cached on disk in entries, one file each, which ranks share and killed runs resume.

Every entry is verified: by a checksum over its content and its path, and by a schema that the reader passes.
An entry that is damaged, truncated, foreign or of another shape is recomputed, and the report notes it.
"""

from __future__ import annotations

import hashlib
import json
import os
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

from .dist import Ranks
from .errors import DataError, RadioError, shown
from .io import MAX_DATA_BYTES, check_writable, lines_of, read_text, validate, write_bytes, write_text

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # as `write_bytes` calls them
_DAY = 24 * 3600
_CHECKSUM = "checksum"  # key in an entry's metadata or first line


class DamagedError(DataError):
    """An entry whose content is not what was written; it can be recomputed."""


class TensorSpec(NamedTuple):
    """Expected type and shape of a tensor in an entry; None allows any size, or any shape."""

    dtype: torch.dtype
    shape: tuple[int | None, ...] | None


class Tensors(NamedTuple):
    """Content of an entry of tensors."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@final
class Damage:
    """Collects the damaged entries of a run, for the notes of its report."""

    def __init__(self) -> None:
        self._reasons: list[str] = []

    def add(self, error: DamagedError) -> None:
        """Record a damaged entry."""
        self._reasons.append(str(error))

    def notes(self, group: Ranks | None = None) -> tuple[str, ...]:
        """Return a note on the damaged entries of all ranks; empty when there are none.

        Every rank has to call this, and gets the same note.
        """
        reasons = [reason for rank in (group or Ranks()).gather_objects(self._reasons) for reason in rank]
        if not reasons:
            return ()
        files = "file of the cache was" if len(reasons) == 1 else "files of the cache were"
        return (f"{len(reasons)} damaged {files} made again; the first: {reasons[0]}",)


def chunk_path(folder: Path, number: int, ending: str = "safetensors") -> Path:
    """Return the path of a chunk's file."""
    return folder / f"{number:06d}.{ending}"


def find_missing(paths: Sequence[Path], read: Callable[[Path], object], damage: Damage) -> list[int]:
    """Return the indices in `paths` of the entries that have to be computed: absent and damaged ones.

    Args:
        read: returns an entry's content, or raises DamagedError.
        damage: collects the damaged ones. Their files stay until they are replaced, since another run with
            the same cache may just have replaced them.
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


def cached_chunks(
    folder: Path,
    count: int,
    *,
    read: Callable[[Path], object],
    make: Callable[[list[int]], None],
    ranks: Ranks | None = None,
    damage: Damage | None = None,
    ending: str = "safetensors",
) -> list[Path]:
    """Compute the missing ones of `count` chunks, and return the paths of all.

    Rank r computes chunks r, r + world, ...; a killed run resumes with the first missing one. So the content
    depends on neither ranks nor interruptions.

    Args:
        read: returns a chunk's content, or raises DamagedError; a damaged chunk is computed again.
        make: computes the chunks of these numbers and writes each to its `chunk_path`.
        damage: collects the damaged ones.

    Raises:
        RadioError: of `make`, on every rank.
        DataError: ranks do not share the folder.
    """
    ranks = ranks or Ranks()
    paths = [chunk_path(folder, number, ending) for number in range(count)]
    local = range(ranks.rank, count, ranks.world)
    missing = [local[i] for i in find_missing([paths[n] for n in local], read, damage or Damage())]
    problem = None
    try:
        if missing:
            check_writable(folder, "--cache", utf8=True)
            make(missing)
    except RadioError as error:
        problem = error
    ranks.agree(problem)
    check_all_there(paths)
    return paths


def remove_stray(folder: Path) -> None:
    """Remove the temporary files, older than a day, that killed runs left in a folder of entries."""
    for path in folder.glob(".*"):
        with suppress(OSError):  # another run may do the same
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def check_all_there(paths: Iterable[Path]) -> None:
    """Check that the chunks of every rank are in the folder.

    Raises:
        DataError: some are missing, since the ranks do not share the folder.
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


def read_tensors(path: Path, specs: Mapping[str, TensorSpec]) -> Tensors:
    """Read an entry of tensors and check it.

    Raises:
        DamagedError: it is not what `write_tensors` wrote at this path, or does not match the specs.
    """
    content = load_tensors(path)
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
    """Write an entry of JSON records atomically: a line with their checksum, then one record per line."""
    body = "".join(json.dumps(record) + "\n" for record in records)
    write_text(path, json.dumps({_CHECKSUM: _text_checksum(path, body)}) + "\n" + body)


def read_records(path: Path, schema: TypeAdapter[T]) -> list[T]:
    """Read an entry of JSON records; lists become tuples where the schema has tuples.

    Raises:
        DamagedError: it is not what `write_records` wrote at this path, or a record violates the schema.
    """
    text = read_text(path, limit=MAX_DATA_BYTES, error=DamagedError)
    first, _, body = text.partition("\n")
    if first != json.dumps({_CHECKSUM: _text_checksum(path, body)}):
        raise DamagedError(f"{shown(path)}: its checksum does not fit its content")
    records = [json.loads(line) for line in lines_of(body)]  # trusted, as the checksum matches
    return [validate(schema, record, path, error=DamagedError, strict=False) for record in records]


def load_tensors(path: Path, names: Iterable[str] | None = None) -> Tensors:
    """Read some tensors of an entry that this run has checked or written; None: all.

    Raises:
        DamagedError: it was damaged afterwards.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise DamagedError(f"{shown(path)}: is no regular file")
        with safetensors.safe_open(path, framework="pt") as file:
            chosen = file.keys() if names is None else names
            # Copies, since mapped memory changes when another process writes into the file.
            tensors = {name: file.get_tensor(name).clone() for name in chosen}
            return Tensors(tensors, dict(file.metadata() or {}))
    except RadioError:
        raise
    # safetensors and torch raise errors of many types at a foreign header.
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{shown(path)}: is cut, damaged, or no such entry ({error})") from error


def _checksum(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash tensors, metadata and the last two parts of the path, so that no entry can replace another."""
    sha = hashlib.sha256(json.dumps([*path.parts[-2:], sorted(metadata.items())]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _text_checksum(path: Path, body: str) -> str:
    return hashlib.sha256(json.dumps([*path.parts[-2:], body]).encode()).hexdigest()


def default_cache() -> Path:
    """Return the default cache folder of features: `$XDG_CACHE_HOME/am-radio`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "am-radio"

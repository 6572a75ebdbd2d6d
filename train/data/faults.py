"""Unreadable data of a run: counted by cause, each listed once, and tolerated up to a share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from radio.errors import DataError, shown
from radio.io import decode_text, lines_of, parse_json, read_bytes, validate, write_bytes

Cause = Literal["image", "missing", "unreadable", "truncated", "empty", "left out"]
ALL_CAUSES: tuple[Cause, ...] = get_args(Cause)
CAUSES: tuple[Cause, ...] = ALL_CAUSES[:-1]  # those that count as broken
SHARD_CAUSES: tuple[Cause, ...] = CAUSES[1:]

LOG_KEYS: dict[Cause, str] = {
    "image": "data/decode_errors",
    **{cause: f"data/{cause}_shards" for cause in SHARD_CAUSES},
}
_WORDS: dict[Cause, str] = {
    "image": "images that cannot be decoded",
    "missing": "missing shards",
    "unreadable": "unreadable shards",
    "truncated": "truncated shards",
    "empty": "shards without images",
}
_FREE = 10  # always tolerated
_LISTED = 100_000  # lines of the list; further faults are only counted
_MAX_BYTES = 1 << 30  # of the list


class ReadError(NamedTuple):
    """One unreadable image or shard, or a shard with files that belong to no sample ("left out")."""

    cause: Cause
    where: str
    why: str


class _Entry(TypedDict):
    """One line of the list."""

    cause: Cause
    where: str
    why: str


_ENTRY = TypeAdapter(_Entry)


@dataclass(slots=True)
class ReadStats:
    """Statistics that lanes collect while they read images."""

    shards: int = 0  # started
    faults: list[ReadError] = field(default_factory=list)


class ShardError(DataError):
    """A shard that cannot be read any further, with the cause."""

    def __init__(self, cause: Cause, why: str) -> None:
        super().__init__(why)
        self.cause: Cause = cause


class FaultList:
    """The file that lists each broken image or shard once, however often a run or its resumption meets it.

    Args:
        path: the file; its existing valid records are kept.
        tell: called with a message for the user.

    Raises:
        DataError: the path is not a file.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._path, self._tell = path, tell
        self._known: set[tuple[str, str]] = set()
        self._waiting: list[ReadError] = []  # not written yet
        if path.exists():
            self._read()

    def add(self, faults: Iterable[ReadError]) -> None:
        """Write the faults that the file does not list yet; retry next time if the disk is full."""
        clean = (ReadError(fault.cause, shown(fault.where), shown(fault.why)) for fault in faults)
        met = {(fault.cause, fault.where): fault for fault in (*self._waiting, *clean)}
        new = [fault for name, fault in met.items() if name not in self._known]
        new = new[: max(_LISTED - len(self._known), 0)]
        if not new:
            return
        try:
            self._append("".join(f"{json.dumps(fault._asdict())}\n" for fault in new).encode())
        except OSError as error:
            if not self._waiting:
                self._tell(
                    f"{shown(self._path)}: {error.strerror or error}; its new lines wait for the next time"
                )
            self._waiting = new
            return
        self._waiting = []
        first = next((fault for fault in new if fault.cause == "left out"), None)
        if first and not any(cause == "left out" for cause, _ in self._known):
            self._tell(f"{first.where}: {first.why}; {self._path.name} names all such shards")
        self._known.update((fault.cause, fault.where) for fault in new)

    def check_names(self, count: int) -> None:
        """Tell the user if the file lists none of the `count` faults that the run met before."""
        if count and not self._known:
            self._tell(f"{self._path}: names none of the {count} broken data met before, and begins anew")

    def _append(self, data: bytes) -> None:
        """Append to the file, all of the data or nothing."""
        with self._path.open("ab") as file:
            end = file.tell()
            try:
                file.write(data)
                file.flush()
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def _read(self) -> None:
        """Read the file's records; if it has other lines, keep a copy of it and tell the user."""
        data = read_bytes(self._path, limit=_MAX_BYTES)
        try:
            text = decode_text(data, self._path)
        except DataError:
            text = data.decode("utf-8", "replace")  # our records are ASCII: only foreign lines change
        kept, foreign = [], []
        for number, line in enumerate(lines_of(text), 1):
            where = f"line {number}"
            try:
                entry = validate(_ENTRY, parse_json(line, where), where)
            except DataError as error:
                foreign.append(str(error))
                continue
            kept.append(line)
            self._known.add((entry["cause"], entry["where"]))
        mended = "".join(f"{line}\n" for line in kept).encode()
        if mended == data:
            return
        if foreign:
            aside = self._path.with_suffix(f"{self._path.suffix}.damaged")
            self._path.replace(aside)
            self._tell(
                f"{shown(self._path)}: {len(foreign)} of {len(foreign) + len(kept)} lines are no records of "
                f"broken data ({foreign[0]}); they are left out, and the file as it was is now {aside.name}"
            )
        write_bytes(self._path, mended)


def check_share(broken: int, seen: int, largest: float, things: str = "images") -> None:
    """Check that few enough of the images or shards seen were broken.

    Raises:
        DataError: their share exceeds `largest` (ten are always tolerated).
    """
    if broken > max(_FREE, largest * seen):
        raise DataError(
            f"{broken} of {seen} {things} cannot be read; mend the data or raise --data.max-error-fraction"
        )


def in_words(counts: Mapping[Cause, int]) -> str:
    """Format counts as `1 missing shards, 12 images that cannot be decoded`; empty without any."""
    return ", ".join(f"{counts[cause]} {_WORDS[cause]}" for cause in CAUSES if counts.get(cause))

"""What cannot be read in a run's data: told apart by cause, counted, listed once, endured up to a share."""

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

Cause = Literal["picture", "missing", "unreadable", "truncated", "empty", "left out"]
ALL_CAUSES: tuple[Cause, ...] = get_args(Cause)
CAUSES: tuple[Cause, ...] = ALL_CAUSES[:-1]  # of what counts as broken
SHARD_CAUSES: tuple[Cause, ...] = CAUSES[1:]

_WORDS: dict[Cause, str] = {
    "picture": "pictures that cannot be decoded",
    "missing": "missing shards",
    "unreadable": "unreadable shards",
    "truncated": "truncated shards",
    "empty": "shards without pictures",
}
_FREE = 10  # so many are always let through
_LISTED = 100_000  # lines of the list; beyond them faults are only counted
_MAX_BYTES = 1 << 30  # of the list


class Fault(NamedTuple):
    """One thing that cannot be read, or that a shard holds beside its samples ("left out")."""

    cause: Cause
    where: str
    why: str


class _Entry(TypedDict):
    """A line of the list."""

    cause: Cause
    where: str
    why: str


_ENTRY = TypeAdapter(_Entry)


@dataclass(slots=True)
class Tally:
    """What lanes put down while they take pictures."""

    shards: int = 0  # begun
    faults: list[Fault] = field(default_factory=list)


class ShardError(DataError):
    """A shard that cannot be read on, and why."""

    def __init__(self, cause: Cause, why: str) -> None:
        super().__init__(why)
        self.cause: Cause = cause


class FaultList:
    """The file that names each broken thing once, however often a run or its resumption meets it.

    Args:
        path: the file; what it holds already is kept, as far as it is records of ours.
        tell: called with a line for the user.

    Raises:
        DataError: something else than a file is there.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._path, self._tell = path, tell
        self._known: set[tuple[str, str]] = set()
        self._waiting: list[Fault] = []  # could not be written yet
        if path.exists():
            self._read()

    def add(self, faults: Iterable[Fault]) -> None:
        """Write those that the file does not name yet. What a full disk refuses is written the next time."""
        clean = (Fault(fault.cause, shown(fault.where), shown(fault.why)) for fault in faults)
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
        """Tell the user where the file names none of the broken things that a run has met before."""
        if count and not self._known:
            self._tell(f"{self._path}: names none of the {count} broken data met before, and begins anew")

    def _append(self, data: bytes) -> None:
        """Write at the end of the file, all of it or nothing."""
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
        """Take up the records of the file; one with other lines is kept aside, and the user is told."""
        data = read_bytes(self._path, limit=_MAX_BYTES)
        try:
            text = decode_text(data, self._path)
        except DataError:
            text = data.decode("utf-8", "replace")  # ours is ASCII: only lines of others change
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


def check_share(broken: int, seen: int, largest: float, things: str = "pictures") -> None:
    """None, while few enough of the pictures or shards seen were broken.

    Raises:
        DataError: their share is beyond the largest (ten are always let through).
    """
    if broken > max(_FREE, largest * seen):
        raise DataError(
            f"{broken} of {seen} {things} cannot be read; mend the data or raise --data.max-broken"
        )


def in_words(counts: Mapping[Cause, int]) -> str:
    """Such as `1 missing shards, 12 pictures that cannot be decoded`; empty without any."""
    return ", ".join(f"{counts[cause]} {_WORDS[cause]}" for cause in CAUSES if counts.get(cause))

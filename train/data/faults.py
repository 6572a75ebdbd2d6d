"""What cannot be read in a run's data: told apart by cause, counted, listed once, endured up to a share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from radio.errors import DataError
from radio.io import write_text

Cause = Literal["picture", "missing", "unreadable", "truncated", "empty"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
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


class Fault(NamedTuple):
    """One thing that cannot be read."""

    cause: Cause
    where: str
    why: str


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
    """The file that names each broken thing once, however often a run or its resumption meets it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[tuple[str, str]] = set()
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off by a kill
            if whole != text:
                write_text(path, whole)
            entries = map(json.loads, whole.splitlines())
            self._known = {(entry["cause"], entry["where"]) for entry in entries}

    def add(self, faults: Iterable[Fault]) -> None:
        """Write those that the file does not name yet."""
        met = {(fault.cause, fault.where): fault for fault in faults}
        new = [fault for name, fault in met.items() if name not in self._known]
        new = new[: _LISTED - len(self._known)]
        if not new:
            return
        self._known.update((fault.cause, fault.where) for fault in new)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(fault._asdict())}\n" for fault in new)


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

"""What cannot be read: counted by cause, listed once each, and tolerated up to a fraction of the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, final, get_args

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from radio.dist import Ranks
from radio.errors import CheckpointError, DataError, shown
from radio.io import decode_text, lines_of, parse_json, read_bytes, validate, write_bytes

Cause = Literal["image", "missing", "unreadable", "truncated", "empty", "left out"]
CAUSES: tuple[Cause, ...] = get_args(Cause)[:-1]  # those that count as broken
SHARD_CAUSES: tuple[Cause, ...] = CAUSES[1:]

ERROR_LIST = "broken.jsonl"  # in the run folder
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
_MAX_LINES = 100_000  # of the list; further errors are only counted
_MAX_BYTES = 1 << 30  # of the list


class ReadError(NamedTuple):
    """One unreadable image or shard, or a shard with files that belong to no sample ("left out")."""

    cause: Cause
    where: str
    why: str


class ShardError(DataError):
    """A shard that cannot be read any further, with the cause."""

    def __init__(self, cause: Cause, why: str) -> None:
        super().__init__(why)
        self.cause: Cause = cause


@dataclass(slots=True)
class ReadStats:
    """Statistics that streams collect while they read images."""

    shards: int = 0  # started
    errors: list[ReadError] = field(default_factory=list)


def check_fraction(broken: int, seen: int, largest: float, things: str = "images") -> None:
    """Check that few enough of the images or shards seen were broken.

    Raises:
        DataError: their fraction exceeds `largest` (ten are always tolerated).
    """
    if broken > max(_FREE, largest * seen):
        raise DataError(
            f"{broken} of {seen} {things} cannot be read; mend the data or raise --data.max-error-fraction"
        )


@final
class ErrorMonitor:
    """Counts a run's read errors over all ranks; the first rank lists each once in the run folder.

    Args:
        out: the run folder.
        ranks: all ranks of the run.
        log: called with a message for the user.

    Raises:
        DataError: the path of the list is not a file.
    """

    def __init__(self, out: Path, ranks: Ranks, log: Callable[[str], None]) -> None:
        self._ranks = ranks
        self._list = ErrorList(out / ERROR_LIST, log) if ranks.leads else None
        self._counts = torch.zeros(len(CAUSES) + 1, dtype=torch.int64)  # of this rank; the last: shards
        self._left_out = 0  # reports of shards with files of no sample
        self._new: list[ReadError] = []
        self._listed = [0] * (len(CAUSES) + 1)  # counts when the list was last written
        self._totals: dict[Cause, int] = {}

    def add(self, shards: int, errors: Iterable[ReadError]) -> None:
        """Count the shards that were started, and errors."""
        self._counts[-1] += shards
        for error in errors:
            if error.cause in CAUSES:
                self._counts[CAUSES.index(error.cause)] += 1
            else:
                self._left_out += 1
            self._new.append(error)

    def check(self, seen: int, largest: float) -> dict[Cause, int]:
        """Return the counts of all ranks by cause, and list new errors. Every rank calls it.

        Args:
            seen: images trained on.
            largest: largest tolerated fraction of broken images, and of broken shards.

        Raises:
            DataError: the fraction is exceeded.
        """
        numbers = torch.tensor([*self._counts.tolist(), self._left_out])
        *totals, shards, left_out = self._ranks.sum(numbers).tolist()
        if [*totals, left_out] != self._listed:
            new = self._ranks.gather_objects(self._new)
            self._new = []
            if self._list is not None:
                self._list.add(error for errors in new for error in errors)
        self._listed = [*totals, left_out]
        self._totals = counts = dict(zip(CAUSES, totals, strict=True))
        check_fraction(counts["image"], seen + counts["image"], largest)
        check_fraction(sum(counts[cause] for cause in SHARD_CAUSES), shards, largest, "shards")
        return counts

    def describe(self) -> str:
        """Format the last counts as `1 missing shards, 12 images that cannot ...`; empty without any."""
        return ", ".join(f"{self._totals[c]} {_WORDS[c]}" for c in CAUSES if self._totals.get(c))

    def state_dict(self) -> list[int]:
        """Return the counts of all ranks; every rank calls it."""
        return [int(count) for count in self._ranks.sum(self._counts)]

    def load_state_dict(self, counts: Sequence[int]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it counts other things.
        """
        if len(counts) != len(self._counts):
            raise CheckpointError(
                f"the state counts {len(counts)} kinds of broken data, wanted {len(self._counts)}; "
                f"it is of another version: go on with that one, or --restart to begin anew"
            )
        if self._list is not None:  # the first rank only, so that the sum over ranks is unchanged
            self._counts = torch.tensor(counts, dtype=torch.int64)
            self._list.check_names(sum(counts[:-1]))


class _ListedError(TypedDict):
    """One line of the list."""

    cause: Cause
    where: str
    why: str


_ENTRY = TypeAdapter(_ListedError)


class ErrorList:
    """The file that lists each broken image or shard once, however often a run or its resumption meets it.

    Args:
        path: the file; its existing valid records are kept.
        log: called with a message for the user.

    Raises:
        DataError: the path is not a file.
    """

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self._path, self._log = path, log
        self._known: set[tuple[str, str]] = set()
        self._pending: list[ReadError] = []  # not written yet
        if path.exists():
            self._read()

    def add(self, errors: Iterable[ReadError]) -> None:
        """Write the errors that the file does not list yet; retry next time if the disk is full."""
        clean = (ReadError(error.cause, shown(error.where), shown(error.why)) for error in errors)
        by_name = {(error.cause, error.where): error for error in (*self._pending, *clean)}
        new = [error for name, error in by_name.items() if name not in self._known]
        new = new[: max(_MAX_LINES - len(self._known), 0)]
        if not new:
            return
        try:
            self._append("".join(f"{json.dumps(error._asdict())}\n" for error in new).encode())
        except OSError as problem:
            if not self._pending:
                self._log(
                    f"{shown(self._path)}: {problem.strerror or problem}; "
                    f"its new lines wait for the next time"
                )
            self._pending = new
            return
        self._pending = []
        first = next((error for error in new if error.cause == "left out"), None)
        if first and not any(cause == "left out" for cause, _ in self._known):
            self._log(f"{first.where}: {first.why}; {self._path.name} names all such shards")
        self._known.update((error.cause, error.where) for error in new)

    def check_names(self, count: int) -> None:
        """Tell the user if the file lists none of the `count` errors that the run met before."""
        if count and not self._known:
            self._log(f"{self._path}: names none of the {count} broken data met before, and begins anew")

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
            self._log(
                f"{shown(self._path)}: {len(foreign)} of {len(foreign) + len(kept)} lines are no records of "
                f"broken data ({foreign[0]}); they are left out, and the file as it was is now {aside.name}"
            )
        write_bytes(self._path, mended)

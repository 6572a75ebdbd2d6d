"""Sinks for a run's records: a JSONL file and the console."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from radio.errors import RadioError, shown
from radio.io import write_bytes, write_text

from .config import TrainConfig
from .records import Record, read_lines


def say(console: Console, line: str) -> None:
    """Print a line literally: without markup, and with control characters escaped."""
    console.print(shown(line), markup=False, emoji=False, highlight=False, soft_wrap=True)


class Sink(Protocol):
    """A place for records."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def close(self) -> None:
        """Finish writing and close the sink."""


class JsonLines:
    """`metrics.jsonl`: one record per log step, written to disk immediately.

    A failed write (such as a full disk) is reported and retried with the next record.

    Args:
        path: the file.
        step: records of later steps, from an interrupted run, are dropped.
        tell: called with a message about what could not be read or written.

    Raises:
        DataError: the file cannot be read.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, step: int, tell: Callable[[str], None]) -> None:
        self._path, self._tell = path, tell
        lines = read_lines(path)
        if lines.others:
            aside = _set_aside(path)
            tell(f"{path}: {lines.others} lines are no records, and left out; the file as it was: {aside}")
        kept = [line for line, record in lines.records if int(record["step"] or 0) <= step]
        self.begins = not kept  # the file begins with the next record
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._pending = b""

    def write(self, record: Record) -> None:
        """Append one record; a mean over no steps is null."""
        plain = {name: None if _is_undefined(value) else value for name, value in record.items()}
        waiting = bool(self._pending)
        self._pending += (json.dumps(plain, allow_nan=False) + "\n").encode()
        reason = self.flush()
        if reason and not waiting:
            self._tell(f"{self._path} could not be written ({reason}); its records are kept until it can")

    def flush(self) -> str:
        """Retry unwritten records; return the reason of a new failure, else an empty string."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(self._pending)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)  # no half of a record
            return error.strerror or str(error)
        self._pending = b""
        return ""

    def close(self) -> None:
        """Close the file.

        Raises:
            RadioError: some records cannot be written.
        """
        reason = self.flush()
        self._file.close()
        if reason:
            raise RadioError(
                f"{self._path}: the last records could not be written ({reason}); make room and give the "
                f"same command again"
            )


class ProgressConsole:
    """A progress bar with loss, rate and remaining time on a terminal; plain lines elsewhere."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(shown(title), total=total, completed=done, figures="")
        self._title, self._total = title, total

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, done: int, figures: str = "") -> None:
        """Set the progress to `done`; `figures` is a text to show beside it."""
        if figures:
            self._progress.update(self._task, figures=shown(figures))
        self._progress.update(self._task, completed=done)
        if figures and not self.console.is_terminal:
            say(self.console, f"{self._title} {done}/{self._total}  {figures}")


def summarise(record: Record, config: TrainConfig) -> str:
    """Format one record in a line: the loss, each teacher's summary/spatial losses, and the rate.

    A loss with weight 0 is shown as a dash.
    """

    def part(name: str, weight: float) -> str:
        return f"{record[name]:.3f}" if weight else "-"

    parts = []
    for t in config.teachers:
        summary = part(f"{t.name}/summary", t.summary_weight)
        parts.append(f"{t.name} {summary}/{part(f'{t.name}/spatial', t.spatial_weight)}")
    return f"loss {record['loss']:.3f}  {' '.join(parts)}  {record['images_per_second']:.0f} img/s"


def _is_undefined(value: float | str | None) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _set_aside(path: Path) -> Path:
    """Copy a damaged file to a name with a hash of its content."""
    data = path.read_bytes()
    aside = path.with_suffix(f".damaged-{hashlib.sha256(data).hexdigest()[:8]}{path.suffix}")
    write_bytes(aside, data)
    return aside

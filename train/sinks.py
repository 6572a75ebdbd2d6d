"""Where a run's figures go: a JSONL file and the console."""

from __future__ import annotations

import json
import math
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

from radio.io import write_text

from .config import TrainConfig

Record = dict[str, float | int | str | None]


class Sink(Protocol):
    """A place for records."""

    def write(self, record: Record) -> None:
        """Take in one record."""

    def close(self) -> None:
        """End with what was taken in."""


class JsonLines:
    """`metrics.jsonl`: one record a log step, flushed as it is written.

    Args:
        path: the file.
        step: records of later steps, left by a run that was stopped, are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        write_text(path, "".join(f"{line}\n" for line in _lines(path) if _step_of(line) <= step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record; a mean over no steps at all is null."""
        plain = {name: None if _is_undefined(value) else value for name, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressConsole:
    """A bar with loss, rate and time left on a terminal; plain lines elsewhere."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, figures="")
        self._title, self._total = title, total

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, done: int, figures: str = "") -> None:
        """Show that `done` are done; `figures` is what there is to say of them."""
        if figures:
            self._progress.update(self._task, figures=figures)
        self._progress.update(self._task, completed=done)
        if figures and not self.console.is_terminal:
            self.console.print(
                f"{self._title} {done}/{self._total}  {figures}", highlight=False, soft_wrap=True
            )


def summarise(record: Record, config: TrainConfig) -> str:
    """The figures of one record on one line: the loss, each teacher's summary/spatial, and the rate.

    A part that has no weight in the loss is a dash.
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


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that was cut off by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")

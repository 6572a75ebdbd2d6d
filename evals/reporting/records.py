"""The lines beside a report: what a model said of each sample. What cannot be read is told, not raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from evals.core.report import Report

T = TypeVar("T")

_NEIGHBOURS = 8  # that are kept of a record: hundreds of each of 50,000 would fill the memory


class Entry(NamedTuple):
    """A report and where it lies."""

    report: Report
    path: Path


class Classified(NamedTuple):
    """A picture, its class, and what it was taken for."""

    key: str
    label: str
    predictions: tuple[str, ...]
    logits: tuple[float, ...] = ()
    neighbours: tuple[str, ...] = ()
    similarities: tuple[float, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the first prediction is the class."""
        return self.predictions[:1] == (self.label,)


class Answered(NamedTuple):
    """A question and what was answered."""

    image: str
    question: str
    answer: str
    expected: str
    score: float


def classified(record: dict[str, Any]) -> Classified:
    """A line of k-NN's or zero-shot's records."""
    return Classified(
        key=str(record["key"]),
        label=str(record["label"]),
        predictions=tuple(map(str, record["predictions"])),
        logits=tuple(map(float, record.get("logits", ()))),
        neighbours=tuple(map(str, record.get("neighbours", ())[:_NEIGHBOURS])),
        similarities=tuple(map(float, record.get("similarities", ())[:_NEIGHBOURS])),
    )


class Drawn(NamedTuple):
    """A mask that was drawn."""

    annotation: str
    iou: float


def drawn(record: dict[str, Any]) -> Drawn:
    """A line of SAM's records."""
    return Drawn(annotation=str(record["annotation_id"]), iou=float(record["iou"]))


def answered(record: dict[str, Any]) -> Answered:
    """A line of VQA's records."""
    expected = record["expected"]
    many = expected if isinstance(expected, list) else [expected]
    return Answered(
        image=str(record.get("image") or ""),
        question=str(record["question"]),
        answer=str(record["answer"]),
        expected=" / ".join(dict.fromkeys(map(str, many))),
        score=float(record["score"]),
    )


def read_records(entry: Entry, reader: Callable[[dict[str, Any]], T]) -> tuple[dict[str, list[T]], list[str]]:
    """The records of a report by their file, and what is to be said about those that cannot be read."""
    found: dict[str, list[T]] = {}
    notes = []
    names = [name for name in entry.report.files if name.endswith(".jsonl")]
    if not names:
        notes.append(f"{entry.report.model}: the report names no records")
    folder = entry.path.parent.resolve()
    for name in names:
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(folder):
            notes.append(f"{entry.report.model}: {name} is not there, so single samples are not shown")
            continue
        kept, count = [], 0
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                count += 1
                record = _parse(line, reader)
                kept += [] if record is None else [record]
        if len(kept) < count:
            notes.append(
                f"{entry.report.model}: {count - len(kept)} of the {count} lines of {name} cannot be read as "
                f"records and are left out"
            )
        if kept:
            found[name] = kept
    return found, notes


def _parse(line: str, reader: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        return reader(json.loads(line))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None

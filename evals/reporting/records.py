"""The lines beside a report: what a model said of each sample. What cannot be read is told, not raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypeVar

from pydantic import FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from evals.core.report import Report
from radio.errors import RadioError, shown
from radio.io import decode_text, parse_json, validate

T = TypeVar("T")

_MAX_LINE = 16 << 20  # bytes of a record

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


class _Classified(TypedDict):
    key: str
    label: str
    predictions: list[str]
    logits: NotRequired[list[FiniteFloat]]
    neighbours: NotRequired[list[str]]
    similarities: NotRequired[list[FiniteFloat]]


class _Drawn(TypedDict):
    annotation_id: int
    iou: FiniteFloat


class _Answered(TypedDict):
    image: NotRequired[str | None]
    question: str
    answer: str
    expected: str | int | list[str | int]
    score: FiniteFloat


_CLASSIFIED, _DRAWN, _ANSWERED = TypeAdapter(_Classified), TypeAdapter(_Drawn), TypeAdapter(_Answered)


def classified(record: Any) -> Classified:
    """A line of k-NN's or zero-shot's records."""
    line = validate(_CLASSIFIED, record, "record")
    return Classified(
        key=line["key"],
        label=line["label"],
        predictions=tuple(line["predictions"]),
        logits=tuple(line.get("logits", ())),
        neighbours=tuple(line.get("neighbours", ())[:_NEIGHBOURS]),
        similarities=tuple(line.get("similarities", ())[:_NEIGHBOURS]),
    )


class Drawn(NamedTuple):
    """A mask that was drawn."""

    annotation: str
    iou: float


def drawn(record: Any) -> Drawn:
    """A line of SAM's records."""
    line = validate(_DRAWN, record, "record")
    return Drawn(annotation=str(line["annotation_id"]), iou=line["iou"])


def answered(record: Any) -> Answered:
    """A line of VQA's records."""
    line = validate(_ANSWERED, record, "record")
    expected = line["expected"]
    many = expected if isinstance(expected, list) else [expected]
    return Answered(
        image=line.get("image") or "",
        question=line["question"],
        answer=line["answer"],
        expected=" / ".join(dict.fromkeys(map(str, many))),
        score=line["score"],
    )


def read_records(entry: Entry, reader: Callable[[Any], T]) -> tuple[dict[str, list[T]], list[str]]:
    """The records of a report by their file, and what is to be said about those that cannot be read."""
    found: dict[str, list[T]] = {}
    notes = []
    names = [name for name in entry.report.files if name.endswith(".jsonl")]
    if not names:
        notes.append(f"{entry.report.model}: the report names no records")
    folder = entry.path.parent.resolve()
    for name in names:
        path = file_inside(folder, name)
        if path is None:
            notes.append(f"{entry.report.model}: {shown(name)} is not there, so single samples are not shown")
            continue
        kept, count = [], 0
        for line in _lines(path):
            count += 1
            record = _parse(line, reader)
            kept += [] if record is None else [record]
        if len(kept) < count:
            notes.append(
                f"{entry.report.model}: {count - len(kept)} of the {count} lines of {shown(name)} cannot be "
                f"read as records and are left out"
            )
        if kept:
            found[name] = kept
    return found, notes


def file_inside(folder: Path, name: str) -> Path | None:
    """Find the regular file of that name inside a resolved folder; None where there is none."""
    try:
        path = (folder / name).resolve()
        return path if path.is_file() and path.is_relative_to(folder) else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
        return None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than any record the first part and the rest."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            yield line


def _parse(line: bytes, reader: Callable[[Any], T]) -> T | None:
    try:
        return reader(parse_json(decode_text(line, "record"), "record"))
    except (RadioError, IndexError):  # an index that the reader has no place for
        return None

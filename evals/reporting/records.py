"""Records of a report: what a model predicted for each sample. Unreadable lines are noted, not raised."""

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

_NEIGHBOURS = 8  # that are held of a record: hundreds for each of 50,000 would fill the memory


class Entry(NamedTuple):
    """A report and the path of its file."""

    report: Report
    path: Path


class Classified(NamedTuple):
    """An image, its class, and the classes predicted for it."""

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
    """A question, the model's answer, the expected answers, and the score."""

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
    """Parse one record of k-NN or zero-shot."""
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
    """A predicted mask: its annotation's id and its IoU."""

    annotation: str
    iou: float


def drawn(record: Any) -> Drawn:
    """Parse one record of SAM."""
    line = validate(_DRAWN, record, "record")
    return Drawn(annotation=str(line["annotation_id"]), iou=line["iou"])


def answered(record: Any) -> Answered:
    """Parse one record of VQA."""
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
    """Read a report's records by file; return them with notes on those that cannot be read."""
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
    """Find the regular file of that name inside a resolved folder; None where none exists."""
    try:
        path = (folder / name).resolve()
        return path if path.is_file() and path.is_relative_to(folder) else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
        return None


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; a line that is longer than any record comes in parts."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            yield line


def _parse(line: bytes, reader: Callable[[Any], T]) -> T | None:
    try:
        return reader(parse_json(decode_text(line, "record"), "record"))
    except (RadioError, IndexError):  # an index out of the reader's range
        return None

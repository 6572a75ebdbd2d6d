"""Records of a run, one per log step, and reading their file, also if it is damaged."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge
from pydantic import AllowInfNan, TypeAdapter
from typing_extensions import TypedDict

from radio.errors import DataError
from radio.io import MAX_DATA_BYTES, decode_text, lines_of, parse_json, read_bytes, validate

Record = dict[str, float | int | str | None]

LOG = "metrics.jsonl"  # in the run folder

_Finite = Annotated[float, AllowInfNan(False)]


class _Stepped(TypedDict):
    step: Annotated[int, Ge(0)]


_STEPPED = TypeAdapter(_Stepped)
_RECORD = TypeAdapter(dict[str, int | _Finite | str | None])


class Lines(NamedTuple):
    """The lines of a log."""

    records: list[tuple[str, Record]]  # each line as written, and its record
    others: int  # lines that are no records, except a last one cut off by a kill


def read_lines(path: Path) -> Lines:
    """Read the lines of a run's log, in order; no records where there is no such file.

    Raises:
        DataError: it is not a regular file, or cannot be opened.
    """
    if not path.exists():
        return Lines([], 0)
    found = Lines([], 0)
    text = _decode(read_bytes(path, limit=MAX_DATA_BYTES), path)
    lines, others = lines_of(text), 0
    for number, line in enumerate(lines, 1):
        record = _read(line, path)
        if record is not None:
            found.records.append((line, record))
        elif line.strip() and (number < len(lines) or text.endswith("\n")):
            others += 1
    return found._replace(others=others)


def read_records(path: Path) -> list[Record]:
    """Read the records of a run's log, in order.

    Raises:
        DataError: as `read_lines`.
    """
    return [record for _, record in read_lines(path).records]


def _decode(data: bytes, path: Path) -> str:
    try:
        return decode_text(data, path)
    except DataError:  # part of it is not text: the other lines are intact
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def _read(line: str, path: Path) -> Record | None:
    try:
        line.encode()
        record = validate(_RECORD, parse_json(line, path), path)
        validate(_STEPPED, {"step": record.get("step")}, path)
    except (DataError, UnicodeEncodeError):
        return None
    return record

"""Reading of benchmark files, record by record, with errors that name file and record."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from radio.errors import DataError, shown
from radio.io import MAX_DATA_BYTES, lines_of, parse_json, read_text

T = TypeVar("T")


def read_json(path: Path) -> Any:
    """Read a benchmark's JSON file, whose objects have each key once.

    Raises:
        DataError: no such file, not JSON, or a duplicate key.
    """
    return parse_json(read_text(path, limit=MAX_DATA_BYTES), path)


def read_list(path: Path) -> list[tuple[str, Any]]:
    """Read one JSON array, or one JSON value per line (JSONL); return each with its place in the file.

    Raises:
        DataError: no such file, or neither.
    """
    text = read_text(path, limit=MAX_DATA_BYTES)
    if re.match(r"\s*\[", text):
        return [(f"record {number}", value) for number, value in enumerate(parse_json(text, path))]
    return [
        (f"line {number}", parse_json(line, f"{shown(path)}: line {number}"))
        for number, line in enumerate(lines_of(text), start=1)
        if line.strip()
    ]


class Row(NamedTuple):
    """One record, its key or index, and its name in errors."""

    key: str
    name: str
    data: dict[str, Any]


@final
class Records:
    """A benchmark's file, and its expected contents for errors: `what` in words, `layout` as a sketch."""

    def __init__(self, path: Path, what: str, layout: str) -> None:
        self.path, self._what, self._layout = path, what, layout
        self._data = read_json(path)

    def listed(self, key: str) -> list[Row]:
        """Return the records of the list under `key`.

        Raises:
            DataError: no such list, an empty one, or one of anything but objects.
        """
        found = self._data.get(key) if isinstance(self._data, dict) else None
        if not isinstance(found, list):
            raise self.refuse(_first(self._data), f"there is no list {key!r} in the file")
        return self._rows(
            [(str(number), f"record {number} of {key!r}", data) for number, data in enumerate(found)]
        )

    def keyed(self) -> list[Row]:
        """Return the records of a JSON object, each with its key.

        Raises:
            DataError: not an object, an empty one, or one of anything but objects.
        """
        if not isinstance(self._data, dict):
            raise self.refuse(_first(self._data), f"the file holds a {type(self._data).__name__}")
        return self._rows([(key, f"record {key[:80]}", data) for key, data in self._data.items()])

    def top(self, key: str) -> str | None:
        """Return a top-level string of the file, or None without one."""
        found = self._data.get(key) if isinstance(self._data, dict) else None
        return found if isinstance(found, str) else None

    def get(self, row: Row, key: str, kind: type[T]) -> T:
        """Return a record's field, checked to be of type `kind`.

        Raises:
            DataError: no such field, or one of another type.
        """
        if key not in row.data:
            raise self.refuse(row.name, f"has no {key!r}")
        found = row.data[key]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            said = reprlib.repr(found)  # values may be huge or deeply nested
            raise self.refuse(row.name, f"its {key!r} is {said}, not a {kind.__name__}")
        return found

    def identity(self, row: Row, key: str) -> str:
        """Return a record's id, which may be an integer or a string in the file.

        Raises:
            DataError: neither.
        """
        if isinstance(row.data.get(key), str):
            return str(row.data[key])
        return str(self.get(row, key, int))

    def texts(self, row: Row, key: str) -> tuple[str, ...]:
        """Return a record's list of strings.

        Raises:
            DataError: no such list, or one of other values.
        """
        found = self.get(row, key, list)
        if not all(isinstance(text, str) for text in found):
            raise self.refuse(row.name, f"its {key!r} holds something else than texts")
        return tuple(found)

    def refuse(self, record: str, problem: str) -> DataError:
        """Return the error about one record."""
        seen = _guess(self._data)
        hint = f"; the file looks like {seen}" if seen and seen != self._what else ""
        return DataError(
            f"{shown(self.path)}: {shown(record)}: {problem}; wanted {self._what}, which are "
            f"{self._layout}{hint}"
        )

    def unique(self, ids: list[str]) -> frozenset[str]:
        """Return the ids as a set.

        Raises:
            DataError: a duplicate id.
        """
        known = frozenset(ids)
        if len(known) < len(ids):
            twice = next(one for one, count in Counter(ids).items() if count > 1)
            raise DataError(
                f"{shown(self.path)}: question {shown(twice)} is there twice; an id may stand for one "
                f"question only"
            )
        return known

    def _rows(self, found: list[tuple[str, str, Any]]) -> list[Row]:
        if not found:
            raise DataError(
                f"{shown(self.path)}: holds no records; wanted {self._what}, which are {self._layout}"
            )
        for _, name, data in found:
            if not isinstance(data, dict):
                raise self.refuse(name, f"is a {type(data).__name__}")
        return [Row(*entry) for entry in found]


def _first(data: Any) -> str:
    """Return the name of the first record of a file of another layout, for the error."""
    return f"record {next(iter(data))[:80]}" if isinstance(data, dict) and data else "record 0"


def _guess(data: Any) -> str:
    """Guess the kind of a file, in the readers' words; empty if unknown."""
    if isinstance(data, dict):
        for key, what in (("questions", "VQAv2's questions"), ("annotations", "VQAv2's annotations")):
            if isinstance(data.get(key), list):
                return what
        if isinstance(data.get("data"), list):
            return _guess_data(data["data"])
        first = next(iter(data.values()), None)
        return _guess_keyed(first)
    first = data[0] if isinstance(data, list) and data else None
    if isinstance(first, dict):
        return "LLaVA's conversations" if "conversations" in first else "predictions"
    return ""


def _guess_data(rows: list[Any]) -> str:
    first = rows[0] if rows else None
    if not isinstance(first, dict):
        return ""
    return "TextVQA's questions" if "question" in first else "OCR tokens"


def _guess_keyed(first: Any) -> str:
    if isinstance(first, list):
        return "ScienceQA's splits"
    if not isinstance(first, dict):
        return ""
    if "imageId" in first:
        return "GQA's questions"
    return "ScienceQA's problems" if "choices" in first else ""

"""Records in others' JSON files: benchmarks' questions and predictions. Needs no torch."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from radio.errors import DataError, shown
from radio.io import MAX_DATA_BYTES, lines_of, parse_json, read_text

from .settings import Task

T = TypeVar("T")


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
    """A benchmark's file, read record by record; errors name the file, the record and what is expected.

    Args:
        what: what the file should be, in words.
        layout: a sketch of its contents.
    """

    def __init__(self, path: Path, what: str, layout: str) -> None:
        self.path, self._what, self._layout = path, what, layout
        self.data = parse_json(read_text(path, limit=MAX_DATA_BYTES), path)

    def rows(self, key: str | None = None) -> list[Row]:
        """Return the records of the list under `key`; without one, of the whole JSON object by their keys.

        Raises:
            DataError: no such list or object, an empty one, or one of anything but objects.
        """
        if not isinstance(self.data, dict):
            raise self.refuse("record 0", f"the file holds a {type(self.data).__name__}")
        records = self.data if key is None else self.data.get(key)
        if isinstance(records, dict) and key is None:
            rows = [Row(name, f"record {name[:80]}", row) for name, row in records.items()]
        elif isinstance(records, list):
            rows = [Row(str(i), f"record {i} of {key!r}", row) for i, row in enumerate(records)]
        else:
            first = next(iter(self.data), "0")
            raise self.refuse(f"record {first[:80]}", f"there is no list {key!r} in the file")
        if not rows:
            raise DataError(
                f"{shown(self.path)}: holds no records; wanted {self._what}, which are {self._layout}"
            )
        for row in rows:
            if not isinstance(row.data, dict):
                raise self.refuse(row.name, f"is a {type(row.data).__name__}")
        return rows

    def top(self, key: str) -> str | None:
        """Return a top-level string of the file, or None without one."""
        value = self.data.get(key)
        return value if isinstance(value, str) else None

    def get(self, row: Row, key: str, type_: type[T]) -> T:
        """Return a record's field, checked to be of a type.

        Raises:
            DataError: no such field, or one of another type.
        """
        if key not in row.data:
            raise self.refuse(row.name, f"has no {key!r}")
        value = row.data[key]
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            # values may be huge or deeply nested
            raise self.refuse(row.name, f"its {key!r} is {reprlib.repr(value)}, not a {type_.__name__}")
        return value

    def identity(self, row: Row, key: str) -> str:
        """Return a record's id, which may be an integer or a string in the file.

        Raises:
            DataError: neither.
        """
        return str(self.get(row, key, str if isinstance(row.data.get(key), str) else int))

    def texts(self, row: Row, key: str) -> tuple[str, ...]:
        """Return a record's list of strings.

        Raises:
            DataError: no such list, or one of other values.
        """
        values = self.get(row, key, list)
        if not all(isinstance(text, str) for text in values):
            raise self.refuse(row.name, f"its {key!r} holds something else than texts")
        return tuple(values)

    def refuse(self, record: str, problem: str) -> DataError:
        """Return the error about one record, with a hint if the file looks like another one."""
        kind = _guess(self.data)
        hint = f"; the file looks like {kind}" if kind and kind != self._what else ""
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
            twice = next(id for id, count in Counter(ids).items() if count > 1)
            raise DataError(
                f"{shown(self.path)}: question {shown(twice)} is there twice; an id may stand for one "
                f"question only"
            )
        return known


_SIGNS = (  # a key of the first record, and what the file then is
    ("imageId", "GQA's questions"),
    ("choices", "ScienceQA's problems"),
    ("conversations", "LLaVA's conversations"),
    ("question", "TextVQA's questions"),
    ("ocr_tokens", "OCR tokens"),
    ("question_id", "predictions"),
)


def _guess(data: Any) -> str:
    """Guess what a file is from the keys of the file and of its first record; empty if unknown."""
    rows = data
    if isinstance(data, dict):
        for key in ("questions", "annotations"):
            if isinstance(data.get(key), list):
                return f"VQAv2's {key}"
        rows = data["data"] if isinstance(data.get("data"), list) else list(data.values())
    first = rows[0] if isinstance(rows, list) and rows else None
    if isinstance(first, list):
        return "ScienceQA's splits"
    return next((what for key, what in _SIGNS if isinstance(first, dict) and key in first), "")


# EvalAI's; GQA's; our records'. EvalAI's and our records'; GQA's; LLaVA's.
_ID_KEYS, _ANSWER_KEYS = ("question_id", "questionId", "id"), ("answer", "prediction", "text")


def read_predictions(path: Path, task: Task | None = None) -> dict[str, str]:
    """Read the answer to each question id, in the order of the file: one JSON object a line, or one array.

    A record is {"question_id": …, "answer": …}; GQA's {"questionId", "prediction"} and LLaVA's
    {"question_id", "text"} are read too, and so are the records of a report.

    Args:
        task: leave out records of other benchmarks, which name theirs as `part`.

    Raises:
        DataError: no such file, an empty file, an invalid record, or questions that are answered twice.
    """
    answers: dict[str, str] = {}
    twice: list[str] = []
    for where, record in read_list(path):
        data = record if isinstance(record, dict) else {}
        if task is not None and data.get("part", task) != task:
            continue
        id = next((data[key] for key in _ID_KEYS if key in data), None)
        answer = next((data[key] for key in _ANSWER_KEYS if key in data), None)
        if not isinstance(id, int | str) or isinstance(id, bool) or not isinstance(answer, str):
            raise DataError(
                f'{shown(path)}: {where}: wanted {{"question_id": a number or a text, "answer": a text}}, '
                f"got {reprlib.repr(record)}"
            )
        if str(id) in answers:
            twice.append(str(id))
        answers[str(id)] = answer
    if twice:
        raise DataError(
            f"{shown(path)}: {len(twice)} predictions are for a question that is answered before, the first "
            f"is for {shown(twice[0])}; keep one prediction a question"
        )
    if not answers:
        raise DataError(f"{shown(path)}: holds no predictions")
    return answers

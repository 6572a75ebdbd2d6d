"""GQA (D. A. Hudson and C. D. Manning 2019): balanced questions, one right answer each, exact match."""

from __future__ import annotations

import re
from functools import partial

from radio.errors import DataError

from ..prompts import short
from .exam import Exam, Grouping, Question, TaskFiles
from .records import Records, Row

_LAYOUT = "{id: {question, imageId, isBalanced, answer}}"
_SPLITS = ("testdev", "val", "train", "challenge", "test")  # in this order: testdev holds test


def read(files: TaskFiles) -> Exam:
    """The balanced questions of a GQA file; others are known, not scored.

    Raises:
        DataError: no such file, not such a file, or one whose split is unknown.
    """
    records = Records(files.questions, "GQA's questions", _LAYOUT)
    rows = records.keyed()
    balanced = [(row, _question(records, row)) for row in rows if records.get(row, "isBalanced", bool)]
    if not balanced:
        raise DataError(
            f"{files.questions}: none of its {len(rows)} questions is balanced; nothing is scored"
        )
    answers = _answers(records, [row for row, _ in balanced])
    return Exam(
        split=_split(files),
        questions=tuple(question for _, question in balanced),
        marks=tuple(partial(_mark, answer) for answer in answers),
        expected=answers,
        known=frozenset(row.key for row in rows),
        groups=_groups([row for row, _ in balanced]),
    )


def tidy(answer: str) -> str:
    """An answer as it is compared: no full stops at its end, small letters."""
    return answer.rstrip(".").lower()


def _mark(truth: str, answer: str) -> float:
    return float(tidy(answer) == truth)


def _question(records: Records, row: Row) -> Question:
    text = records.get(row, "question", str)
    image = records.identity(row, "imageId")
    return Question(row.key, f"{image}.jpg", text, short(text))


def _answers(records: Records, rows: list[Row]) -> tuple[str, ...]:
    """The answer of each question, or nothing where no question has one."""
    if not any("answer" in row.data for row in rows):
        return ()
    return tuple(records.get(row, "answer", str) for row in rows)


def _groups(rows: list[Row]) -> dict[str, Grouping]:
    """By structure and meaning of the questions, where the file says it of every one."""
    types = [row.data.get("types") for row in rows]
    found = {}
    for name in ("structural", "semantic"):
        labels = tuple(str(entry[name]) for entry in types if isinstance(entry, dict) and entry.get(name))
        if len(labels) == len(rows):
            found[name] = Grouping(labels)
    if "structural" in found:
        asked = found["structural"].labels
        found["form"] = Grouping(tuple("open" if label == "query" else "binary" for label in asked))
    return found


def _split(files: TaskFiles) -> str:
    """The split that the file's name says, which scores are labelled with: val and testdev differ."""
    words = re.split(r"[^a-z]+", files.questions.name.lower())
    named = next((split for split in _SPLITS if split in words), None)
    if named is None and files.split is None:
        raise DataError(
            f"{files.questions}: the name does not say the split; give it, such as val or testdev"
        )
    if named and files.split not in (None, named):
        raise DataError(f"{files.questions}: is called {named}, and the split asked for is {files.split}")
    return files.split or str(named)

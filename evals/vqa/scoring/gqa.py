"""GQA (D. A. Hudson and C. D. Manning 2019): balanced questions, one right answer each, exact match."""

from __future__ import annotations

import re
from functools import partial

from radio.errors import DataError

from ..prompts import short
from .exam import Exam, Grouping, Question, TaskFiles
from .records import Records, Row

_LAYOUT = "{id: {question, imageId, isBalanced, answer}}"
_SPLITS = ("testdev", "val", "train", "challenge", "test")  # in this order: `testdev` contains `test`


def read(files: TaskFiles) -> Exam:
    """Read the balanced questions of a GQA file; other ids are accepted in predictions, not scored.

    Raises:
        DataError: no such file, not a GQA file, or an unknown split.
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
    """Normalise an answer for comparison: no full stops at its end, lower case."""
    return answer.rstrip(".").lower()


def _mark(truth: str, answer: str) -> float:
    return float(tidy(answer) == truth)


def _question(records: Records, row: Row) -> Question:
    text = records.get(row, "question", str)
    image = records.identity(row, "imageId")
    return Question(row.key, f"{image}.jpg", text, short(text))


def _answers(records: Records, rows: list[Row]) -> tuple[str, ...]:
    """Read the answer of each question; empty if no question has one."""
    if not any("answer" in row.data for row in rows):
        return ()
    return tuple(records.get(row, "answer", str) for row in rows)


def _groups(rows: list[Row]) -> dict[str, Grouping]:
    """Group the questions by structural and semantic type, if every question has it."""
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
    """Return the split, from the file's name or `files`; it labels the scores, as val and testdev differ."""
    words = re.split(r"[^a-z]+", files.questions.name.lower())
    named = next((split for split in _SPLITS if split in words), None)
    if named is None and files.split is None:
        raise DataError(
            f"{files.questions}: the name does not say the split; give it, such as val or testdev"
        )
    if named and files.split not in (None, named):
        raise DataError(f"{files.questions}: is called {named}, and the split asked for is {files.split}")
    return files.split or str(named)

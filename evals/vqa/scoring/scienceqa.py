"""ScienceQA-IMG (P. Lu et al. 2022): multiple-choice school questions with an image."""

from __future__ import annotations

import os
import re
import reprlib
from functools import partial

from pydantic import TypeAdapter

from radio.errors import DataError, did_you_mean, shown
from radio.io import validate

from ..prompts import choose
from .exam import Exam, Grouping, Question, TaskFiles
from .records import Records, Row, read_json

LETTERS = "ABCDE"
_SPLITS = TypeAdapter(dict[str, list[int | str]])
_SPLITS_LAYOUT = "ScienceQA's splits, {test: [ids], …}"
_LAYOUT = "{id: {question, choices, answer, hint, image}}"
_SAYS = re.compile(r"The answer is ([A-Z]).")  # any character after the letter, as in LLaVA's evaluation
_YOUNG = frozenset(f"grade{number}" for number in range(1, 7))


def read(files: TaskFiles) -> Exam:
    """Read the questions with an image of one split; other ids are accepted in predictions, not scored.

    Raises:
        DataError: no such file, not a ScienceQA file, no such split, or a split without images.
    """
    if files.splits is None:
        raise DataError("ScienceQA's problems need their splits; give pid_splits.json too")
    split = files.split or "test"
    records = Records(files.questions, "ScienceQA's problems", _LAYOUT)
    problems = {row.key: row for row in records.keyed()}
    ids = _ids(files, split)
    absent = [pid for pid in ids if pid not in problems]
    if absent:
        raise DataError(
            f"{files.questions}: has no problem {absent[0]}, which {files.splits.name} lists under {split}, "
            f"nor {len(absent) - 1} others"
        )
    shown = [problems[pid] for pid in ids if records.get(problems[pid], "image", object)]
    if not shown:
        raise DataError(f"{files.questions}: no problem of {split} has an image; nothing is scored")
    answers = [_answer(records, row) for row in shown]
    return Exam(
        split=split,
        questions=tuple(_question(records, row, split, files) for row in shown),
        marks=tuple(partial(_mark, answer, count) for answer, count in answers),
        expected=tuple(LETTERS[answer] for answer, _ in answers),
        known=frozenset(ids),
        groups=_groups(shown),
        missing_is_wrong=True,
    )


def letter(answer: str) -> str | None:
    """Return the letter that an answer chooses, by LLaVA's rule on the unchanged text; None without one.

    It is the whole text, or its first letter before a full stop and a space, or the capital after
    "The answer is " (with any one character after it), if that occurs once.
    """
    if answer in tuple(LETTERS):
        return answer
    if answer[:1] in tuple(LETTERS) and answer[1:3] == ". ":
        return answer[0]
    found = _SAYS.findall(answer)
    return str(found[0]) if len(found) == 1 else None


def _mark(truth: int, count: int, answer: str) -> float:
    chosen = letter(answer)
    return float(chosen is not None and chosen in LETTERS[:count] and LETTERS.index(chosen) == truth)


def _ids(files: TaskFiles, split: str) -> list[str]:
    assert files.splits is not None
    data = validate(_SPLITS, read_json(files.splits), f"{shown(files.splits)} (wanted {_SPLITS_LAYOUT})")
    if split not in data:
        raise DataError(
            f"{shown(files.splits)}: has no split {split!r}; there are "
            f"{', '.join(map(shown, list(data)[:20]))}{did_you_mean(split, data)}"
        )
    return list(dict.fromkeys(str(pid) for pid in data[split]))


def _question(records: Records, row: Row, split: str, files: TaskFiles) -> Question:
    text = records.get(row, "question", str)
    prompt = choose(text, records.texts(row, "choices"), records.get(row, "hint", str).strip())
    folder = str(row.data.get("split") or split.removeprefix("mini"))
    if files.images is not None and not os.path.isdir(files.images / folder):  # noqa: PTH112 (never raises)
        folder = ""  # `images` is the split's own folder
    image = "/".join(part for part in (folder, row.key, records.get(row, "image", str)) if part)
    return Question(row.key, image, text, prompt)


def _answer(records: Records, row: Row) -> tuple[int, int]:
    """Read the index of the right choice, and the number of choices."""
    choices, answer = records.texts(row, "choices"), records.get(row, "answer", int)
    if not 0 <= answer < len(choices) or len(choices) > len(LETTERS):
        raise records.refuse(
            row.name, f"its 'answer' is {reprlib.repr(answer)}, and it has {len(choices)} choices"
        )
    return answer, len(choices)


def _groups(rows: list[Row]) -> dict[str, Grouping]:
    """Group the problems by subject, grade and topic, if every problem has it."""
    found = {}
    for name in ("subject", "grade", "topic"):
        labels = [row.data.get(name) for row in rows]
        if all(isinstance(label, str) and label for label in labels):
            found[name] = Grouping(tuple(map(str, labels)), as_metrics=name != "topic")
    if "grade" in found:
        grades = found["grade"].labels
        found["grade"] = Grouping(tuple("1-6" if grade in _YOUNG else "7-12" for grade in grades))
    return found

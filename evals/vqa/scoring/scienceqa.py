"""ScienceQA-IMG (P. Lu et al. 2022): multiple-choice questions of school that come with a picture."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from radio.errors import DataError, did_you_mean

from ..prompts import choose
from .exam import Exam, Grouping, Question, TaskFiles
from .records import Records, Row, read_json

LETTERS = "ABCDE"
_LAYOUT = "{id: {question, choices, answer, hint, image}}"
_BEGINS = re.compile(rf"([{LETTERS}])\. ")
_SAYS = re.compile(r"The answer is ([A-Z])\.")
_YOUNG = frozenset(f"grade{number}" for number in range(1, 7))


def read(files: TaskFiles) -> Exam:
    """The questions with a picture of one split; those without are known, not scored.

    Raises:
        DataError: no such file, not such a file, no such split, or a split without pictures.
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
        raise DataError(f"{files.questions}: no problem of {split} has a picture; nothing is scored")
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
    """The letter that an answer chooses: `B`, `B. blue`, or `The answer is B.` once in it; else None."""
    said = answer.strip()
    if said in tuple(LETTERS):
        return said
    begins = _BEGINS.match(said)
    if begins:
        return begins.group(1)
    found = _SAYS.findall(said)
    return str(found[0]) if len(found) == 1 else None


def _mark(truth: int, count: int, answer: str) -> float:
    chosen = letter(answer)
    return float(chosen is not None and chosen in LETTERS[:count] and LETTERS.index(chosen) == truth)


def _ids(files: TaskFiles, split: str) -> list[str]:
    assert files.splits is not None
    data: Any = read_json(files.splits, "ScienceQA's splits")
    if not isinstance(data, dict) or not all(isinstance(ids, list) for ids in data.values()):
        raise DataError(f"{files.splits}: wanted ScienceQA's splits, {{test: [ids], …}}")
    if split not in data:
        raise DataError(
            f"{files.splits}: has no split {split!r}; there are {', '.join(data)}{did_you_mean(split, data)}"
        )
    return list(dict.fromkeys(str(pid) for pid in data[split]))


def _question(records: Records, row: Row, split: str, files: TaskFiles) -> Question:
    text = records.get(row, "question", str)
    prompt = choose(text, records.texts(row, "choices"), records.get(row, "hint", str).strip())
    folder = str(row.data.get("split") or split.removeprefix("mini"))
    if files.images is not None and not (files.images / folder).is_dir():
        folder = ""  # the split's own folder was given
    image = "/".join(part for part in (folder, row.key, records.get(row, "image", str)) if part)
    return Question(row.key, image, text, prompt)


def _answer(records: Records, row: Row) -> tuple[int, int]:
    """The place of the right choice, and how many there are."""
    choices, answer = records.texts(row, "choices"), records.get(row, "answer", int)
    if not 0 <= answer < len(choices) or len(choices) > len(LETTERS):
        raise records.refuse(row.name, f"its 'answer' is {answer}, and it has {len(choices)} choices")
    return answer, len(choices)


def _groups(rows: list[Row]) -> dict[str, Grouping]:
    """By subject, grade and topic, where the file says it of every problem."""
    found = {}
    for name in ("subject", "grade", "topic"):
        labels = [row.data.get(name) for row in rows]
        if all(isinstance(label, str) and label for label in labels):
            found[name] = Grouping(tuple(map(str, labels)), as_metrics=name != "topic")
    if "grade" in found:
        grades = found["grade"].labels
        found["grade"] = Grouping(tuple("1-6" if grade in _YOUNG else "7-12" for grade in grades))
    return found

"""The user's own questions: one JSON object per line, about any images, with one or more right answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from radio.errors import DataError, shown
from radio.io import validate

from ..prompts import choose, short
from .exam import Exam, Grouping, Mark, Question, TaskFiles, commonest
from .normalise import official
from .records import read_list
from .scienceqa import LETTERS, letter
from .soft import NUM_ANSWERS, leave_one_out


class _Row(TypedDict):
    """One question."""

    question: str
    image: NotRequired[str | None]  # a file below the images folder, with its extension
    id: NotRequired[int | str]  # default: the number of the question
    answer: NotRequired[str]
    answers: NotRequired[list[str]]
    choices: NotRequired[list[str]]  # the answer is one of them
    category: NotRequired[str]


_MOST_CATEGORIES = 200
_ROW = TypeAdapter(_Row)


def read(files: TaskFiles) -> Exam:
    """Read the questions of a JSONL file, or of one JSON list.

    Raises:
        DataError: no such file, an empty file, a question that does not fit the schema or is not answered,
            or two of one id.
    """
    path = files.questions
    rows = [
        (f"{shown(path)}: {where}", validate(_ROW, row, f"{shown(path)}: {where}"))
        for where, row in read_list(path)
    ]
    if not rows:
        raise DataError(f'{shown(path)}: holds no questions; wanted {{"image", "question", "answer"}} a line')
    questions = [_question(row, number) for number, (_, row) in enumerate(rows, start=1)]
    marked = [_mark(row, where) for where, row in rows]
    categories = [row.get("category", "") for _, row in rows]
    if len(set(categories)) > _MOST_CATEGORIES:
        raise DataError(
            f"{shown(path)}: has {len(set(categories))} categories; wanted {_MOST_CATEGORIES} at most, each "
            f"is a score of its own"
        )
    return Exam(
        split=files.split or path.stem,
        questions=tuple(questions),
        marks=tuple(mark for mark, _ in marked),
        expected=tuple(answer for _, answer in marked),
        known=_unique(path, [question.id for question in questions]),
        groups={"category": Grouping(tuple(categories))} if all(categories) else {},
    )


def exact_or_soft(answer: str, truths: Sequence[str]) -> float:
    """Score an answer after normalising all answers as in VQAv2's evaluation.

    With ten or more people's answers it is VQA's accuracy (0.3, 0.6, 0.9 or 1 for 1, 2, 3 or more of ten who
    agree); with fewer it is 1 if one of them is equal, else 0.
    """
    same = [_normalised(truth) for truth in truths].count(_normalised(answer))
    return leave_one_out(same, len(truths)) if len(truths) >= NUM_ANSWERS else float(same > 0)


def _normalised(answer: str) -> str:
    """Normalise as VQAv2's evaluation does; only strip and lower where that leaves nothing (`the`, `?`)."""
    return official(answer) or answer.strip().lower()


def _question(row: _Row, number: int) -> Question:
    text = row["question"]
    choices = row.get("choices")
    prompt = short(text) if choices is None else choose(text, choices, "")
    return Question(str(row.get("id", number)), row.get("image"), text, prompt)


def _mark(row: _Row, where: str) -> tuple[Mark, str]:
    """Return the scoring function of a question, and the right or most common answer."""
    answers = [*([row["answer"]] if "answer" in row else []), *row.get("answers", [])]
    if not answers or not all(answer.strip() for answer in answers) or not row["question"].strip():
        raise DataError(f"{where}: wanted a question with one or more answers, none of them empty")
    choices = row.get("choices")
    if choices is None:
        return partial(exact_or_soft, truths=answers), commonest(answers)
    if not 2 <= len(choices) <= len(LETTERS) or len(answers) != 1 or choices.count(answers[0]) != 1:
        raise DataError(
            f"{where}: wanted 2 to {len(LETTERS)} choices, and one answer that is one of them; got "
            f"{len(choices)} choices and {len(answers)} answers"
        )
    right = LETTERS[choices.index(answers[0])]
    return partial(_is_letter, right), right


def _is_letter(right: str, answer: str) -> float:
    return float(letter(answer) == right)


def _unique(path: Path, ids: list[str]) -> frozenset[str]:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"{shown(path)}: two questions have the id {shown(name[:80])}; each has its own")
        seen.add(name)
    return frozenset(seen)

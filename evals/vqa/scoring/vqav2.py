"""VQAv2 (Y. Goyal et al. 2017): open questions about COCO's images, each with ten people's answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from radio.errors import DataError
from radio.io import write_text

from ..prompts import short
from .exam import Exam, Grouping, Mark, Question, TaskFiles, commonest
from .normalise import m4c
from .records import Records, Row
from .soft import NUM_ANSWERS, Rule, vqa_accuracy

_QUESTIONS = "{data_subtype, questions: [{question_id, image_id, question}]}"
_ANNOTATIONS = "{data_subtype, annotations: [{question_id, answer_type, answers: [ten of {answer}]}]}"


def read(files: TaskFiles, rule: Rule = "official") -> Exam:
    """Read the questions of a VQAv2 file, and their answers if a file of annotations is given.

    Raises:
        DataError: no such file, not a VQAv2 file, or questions without annotations.
    """
    records = Records(files.questions, "VQAv2's questions", _QUESTIONS)
    rows = records.listed("questions")
    subtype = records.top("data_subtype")
    if subtype is None:
        raise records.refuse("the file", "has no 'data_subtype', which names the images")
    questions = tuple(_question(records, row, subtype) for row in rows)
    known = records.unique([question.id for question in questions])
    split = re.sub(r"\d+$", "", subtype)
    if files.split not in (None, split):
        raise DataError(f"{files.questions}: is {subtype}, and the split asked for is {files.split}")
    if files.annotations is None:
        return Exam(split=split, questions=questions, marks=(), expected=(), known=known)
    answered = _answers(files.annotations, questions, subtype)
    return Exam(
        split=split,
        questions=questions,
        marks=tuple(_marker(answers, rule) for _, answers in answered),
        expected=tuple(commonest(answers) for _, answers in answered),
        known=known,
        groups={"answer_type": Grouping(tuple(kind for kind, _ in answered))},
    )


def write_submission(
    questions: Sequence[Question], answers: Mapping[str, str], path: Path, *, normalise: bool = True
) -> None:
    """Write the predictions in EvalAI's format: one JSON array [{question_id, answer}] of every question.

    The server does not normalise answers where all ten people agree, so that `Yes` is wrong against `yes`;
    therefore they are normalised here, as LLaVA does, unless `normalise` is False.

    Raises:
        DataError: a question without an answer, an answer without a question, or an id that is not a number;
            nothing is written.
    """
    absent = [question.id for question in questions if question.id not in answers]
    if absent:
        raise DataError(
            f"{len(absent)} of the {len(questions)} questions have no answer, the first is {absent[0]}; "
            f"a submission answers all of them, so nothing is written"
        )
    foreign = answers.keys() - {question.id for question in questions}
    if foreign:
        raise DataError(
            f"{len(foreign)} answers are for other questions, such as {min(foreign)}; nothing is written"
        )
    wrong = next((question.id for question in questions if not question.id.isdecimal()), None)
    if wrong is not None:
        raise DataError(f"question id {wrong!r} is no number; these are not VQAv2's questions")
    rows = [
        {"question_id": int(one.id), "answer": m4c(answers[one.id]) if normalise else answers[one.id]}
        for one in questions
    ]
    write_text(path, json.dumps(rows) + "\n")


def _question(records: Records, row: Row, subtype: str) -> Question:
    text = records.get(row, "question", str)
    image = _image(records, row, subtype)
    return Question(str(records.get(row, "question_id", int)), image, text, short(text))


def _image(records: Records, row: Row, subtype: str) -> str:
    folder = subtype.replace("-dev", "")  # test-dev uses some of the test images
    return f"COCO_{folder}_{records.get(row, 'image_id', int):012d}.jpg"


def _answers(path: Path, questions: Sequence[Question], subtype: str) -> list[tuple[str, tuple[str, ...]]]:
    """Read the answer type and the ten answers of each question."""
    records = Records(path, "VQAv2's annotations", _ANNOTATIONS)
    rows = records.listed("annotations")
    said = records.top("data_subtype")
    if said not in (None, subtype):
        raise DataError(f"{path}: holds the annotations of {said}, and the questions are those of {subtype}")
    ids = [str(records.get(row, "question_id", int)) for row in rows]
    records.unique(ids)
    found = dict(zip(ids, rows, strict=True))
    absent = [question.id for question in questions if question.id not in found]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of the {len(questions)} questions have no annotation, the first is "
            f"{absent[0]}; give the annotations of these questions"
        )
    for question in questions:
        row = found[question.id]
        if "image_id" in row.data and _image(records, row, subtype) != question.image:
            raise DataError(
                f"{path}: the annotation of question {question.id} is of image {row.data['image_id']}, and "
                f"the question is about {question.image}; give the annotations of these questions"
            )
    return [_annotation(records, found[question.id]) for question in questions]


def _annotation(records: Records, row: Row) -> tuple[str, tuple[str, ...]]:
    given: list[Any] = records.get(row, "answers", list)
    answers = tuple(entry.get("answer") for entry in given if isinstance(entry, dict))
    texts = tuple(answer for answer in answers if isinstance(answer, str))
    if len(texts) != NUM_ANSWERS or len(given) != NUM_ANSWERS:
        raise records.refuse(row.name, f"its 'answers' hold {len(texts)} answers, not {NUM_ANSWERS}")
    return records.get(row, "answer_type", str), texts


def _marker(truths: tuple[str, ...], rule: Rule) -> Mark:
    return partial(vqa_accuracy, truths=truths, rule=rule)

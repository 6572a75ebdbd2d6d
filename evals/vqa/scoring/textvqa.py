"""TextVQA (A. Singh et al. 2019): questions about the text in an image, each with ten people's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from radio.errors import DataError

from ..prompts import short_with_ocr
from .exam import Exam, Question, TaskFiles, commonest
from .records import Records, Row
from .soft import NUM_ANSWERS, Rule, vqa_accuracy

_LAYOUT = "{data: [{question_id, image_id, question, answers: [ten texts]}]}"
_OCR_LAYOUT = "{data: [{image_id, ocr_tokens}]}"


def read(files: TaskFiles, rule: Rule = "m4c") -> Exam:
    """Read the questions of a TextVQA file, with OCR tokens in their prompts if `files.ocr`.

    Raises:
        DataError: no such file, not a TextVQA file, or images without OCR tokens.
    """
    records = Records(files.questions, "TextVQA's questions", _LAYOUT)
    rows = records.listed("data")
    images = [records.get(row, "image_id", str) for row in rows]
    tokens = _tokens(files, records, rows, images)
    questions = tuple(
        _question(records, row, image, seen) for row, image, seen in zip(rows, images, tokens, strict=True)
    )
    answers = _answers(records, rows)
    return Exam(
        split=_split(files, records, rows),
        questions=questions,
        marks=tuple(partial(vqa_accuracy, truths=ten, rule=rule) for ten in answers),
        expected=tuple(commonest(ten) for ten in answers),
        known=records.unique([question.id for question in questions]),
    )


def _question(records: Records, row: Row, image: str, tokens: Sequence[str] | None) -> Question:
    text = records.get(row, "question", str)
    return Question(records.identity(row, "question_id"), f"{image}.jpg", text, short_with_ocr(text, tokens))


def _answers(records: Records, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Read the ten answers of each question; empty if no question has any."""
    if not any("answers" in row.data for row in rows):
        return []
    found = [records.texts(row, "answers") for row in rows]
    for row, ten in zip(rows, found, strict=True):
        if len(ten) != NUM_ANSWERS:
            raise records.refuse(row.name, f"its 'answers' hold {len(ten)} answers, not {NUM_ANSWERS}")
    return found


def _tokens(
    files: TaskFiles, records: Records, rows: Sequence[Row], images: Sequence[str]
) -> Sequence[Sequence[str] | None]:
    if not files.ocr:
        if files.ocr_file is not None:
            raise DataError(f"{files.ocr_file}: OCR tokens are given and not asked for; turn OCR on as well")
        return [None] * len(rows)
    if files.ocr_file is not None:
        found = _read_tokens(files.ocr_file)
        absent = [image for image in images if image not in found]
        if absent:
            raise DataError(
                f"{files.ocr_file}: has no tokens for {len(set(absent))} images of {files.questions.name}, "
                f"the first is {absent[0]}"
            )
        return [found[image] for image in images]
    if not all("ocr_tokens" in row.data for row in rows):
        raise DataError(
            f"{files.questions}: the questions hold no 'ocr_tokens'; give the file of OCR tokens, or turn "
            f"OCR off"
        )
    return [records.texts(row, "ocr_tokens") for row in rows]


def _read_tokens(path: Path) -> Mapping[str, tuple[str, ...]]:
    records = Records(path, "OCR tokens", _OCR_LAYOUT)
    found: dict[str, tuple[str, ...]] = {}
    for row in records.listed("data"):
        image, tokens = records.get(row, "image_id", str), records.texts(row, "ocr_tokens")
        if found.setdefault(image, tokens) != tokens:
            raise records.refuse(row.name, f"gives {image} other tokens than an earlier record")
    return found


def _split(files: TaskFiles, records: Records, rows: Sequence[Row]) -> str:
    said = records.top("dataset_type") or rows[0].data.get("set_name")
    if not isinstance(said, str):
        said = files.split
    if said is None:
        raise DataError(f"{files.questions}: does not say which split it is; give it, such as val")
    if files.split not in (None, said):
        raise DataError(f"{files.questions}: is {said}, and the split asked for is {files.split}")
    return said

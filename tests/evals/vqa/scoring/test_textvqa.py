from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import TaskFiles, read_textvqa
from evals.vqa.scoring import Benchmark
from radio.errors import DataError


def record(**changes: Any) -> dict[str, Any]:
    found = {
        "question_id": 34602,
        "image_id": "003a8ae2ef43b901",
        "question": "what is the brand of this camera?",
        "answers": ["nous les gosses"] + ["dakota"] * 8 + ["dakota digital"],
        "set_name": "val",
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def opened(tmp_path: Path, *records: dict[str, Any], tokens: Any = None, **files: Any) -> Benchmark:
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": records}))
    if tokens is not None:
        files["ocr_file"] = tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json"
        files["ocr_file"].write_text(json.dumps({"data": tokens}))
    return read_textvqa(TaskFiles(questions=path, **files))


def test_a_question_and_its_scores(tmp_path: Path) -> None:
    exam = opened(tmp_path, record())
    (question,) = exam.questions
    assert (question.id, question.image) == ("34602", "003a8ae2ef43b901.jpg")
    assert question.text == "what is the brand of this camera?"
    assert question.prompt == (
        "What is the brand of this camera?\nAnswer the question using a single word or phrase."
    )
    assert (exam.split, tuple(question.expected for question in exam.questions)) == ("val", ("dakota",))
    assert exam.questions[0].score("Dakota.") == 1.0
    assert exam.questions[0].score("the Dakota, digital") == pytest.approx(0.3)


def test_unanimous_answers_are_normalised_too(tmp_path: Path) -> None:
    exam = opened(tmp_path, record(answers=["Joe's Bar"] * 10))
    assert exam.questions[0].score("the joe's bar!") == 1.0


CAMERA = (
    "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL\n"
    "Answer the question using a single word or phrase."
)


def test_ocr_tokens_from_the_record_or_from_a_file(tmp_path: Path) -> None:
    own = opened(tmp_path, record(ocr_tokens=["DAKOTA", "DIGITAL"]), ocr=True)
    assert own.questions[0].prompt == CAMERA
    tokens = [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": []}]
    assert opened(tmp_path, record(), tokens=tokens, ocr=True).questions[0].prompt == CAMERA
    assert "Reference" not in opened(tmp_path, record(ocr_tokens=["DAKOTA"])).questions[0].prompt
    empty = opened(tmp_path, record(ocr_tokens=[]), ocr=True)
    assert "camera?\nReference OCR token: \nAnswer" in empty.questions[0].prompt


@pytest.mark.parametrize(
    ("records", "files", "said"),
    [
        ([record()], {"ocr": True}, "hold no 'ocr_tokens'; give the file of OCR tokens, or turn OCR off"),
        ([record()], {"tokens": []}, "given and not asked for"),
        (
            [record()],
            {"tokens": [{"image_id": "x", "ocr_tokens": []}], "ocr": True},
            "has no tokens for 1 images .* the first is 003a8ae2ef43b901",
        ),
        ([record(answers=["a"] * 9)], {}, "record 0 of 'data': its 'answers' hold 9 answers, not 10"),
        ([record(), record()], {}, "question 34602 is there twice"),
        ([record(), record(question_id=1, answers=None)], {}, "record 1 of 'data': has no 'answers'"),
        ([record(image_id=None)], {}, "has no 'image_id'"),
        ([record(set_name=None)], {}, "does not say which split it is"),
        ([record()], {"split": "train"}, "is val, and the split asked for is train"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, records: list[dict[str, Any]], files: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened(tmp_path, *records, **files)


def test_a_test_set_has_no_answers(tmp_path: Path) -> None:
    exam = opened(tmp_path, record(answers=None, set_name=None), split="test")
    assert (exam.split, exam.has_answers) == ("test", False)

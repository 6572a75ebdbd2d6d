from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import TaskFiles, read_vqav2
from evals.vqa.scoring import Benchmark, Question, Rule
from radio.errors import DataError

ASKED = [{"question_id": 42000, "image_id": 42, "question": "Is it?"}]


def annotation(*answers: str, number: int = 42000, kind: str = "yes/no") -> dict[str, Any]:
    given = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": person}
        for person, answer in enumerate(answers, start=1)
    ]
    return {"question_id": number, "image_id": 42, "answer_type": kind, "answers": given}


def opened(
    tmp_path: Path,
    annotations: list[dict[str, Any]] | None,
    asked: list[dict[str, Any]] = ASKED,
    subtype: str = "val2014",
    annotated: str = "val2014",
    rule: Rule = "official",
    split: str | None = None,
) -> Benchmark:
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps({"data_subtype": subtype, "questions": asked}))
    if annotations is None:
        return read_vqav2(TaskFiles(questions=questions, split=split), rule)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"data_subtype": annotated, "annotations": annotations}))
    return read_vqav2(TaskFiles(questions=questions, annotations=path, split=split), rule)


def test_questions_and_their_scores(tmp_path: Path) -> None:
    exam = opened(tmp_path, [annotation(*["yes"] * 9, "maybe")])
    (question,) = exam.questions
    assert (question.id, question.image, question.text, question.prompt) == (
        "42000",
        "COCO_val2014_000000000042.jpg",
        "Is it?",
        "Is it?\nAnswer the question using a single word or phrase.",
    )
    assert (exam.split, tuple(question.expected for question in exam.questions)) == ("val", ("yes",))
    assert exam.groups["answer_type"].labels == ("yes/no",)
    assert exam.questions[0].score("Yes.") == 1.0
    assert exam.questions[0].score("maybe") == pytest.approx(0.3)


def test_unanimous_answers_are_left_alone_by_the_official_rule(tmp_path: Path) -> None:
    said = [annotation(*["yes"] * 10)]
    assert opened(tmp_path, said).questions[0].score("Yes") == 0.0
    assert opened(tmp_path, said, rule="llava").questions[0].score("Yes") == 1.0
    assert opened(tmp_path, said, rule="m4c").questions[0].score("Yes") == 1.0


@pytest.mark.parametrize(
    ("subtype", "split", "image"),
    [
        ("test-dev2015", "test-dev", "COCO_test2015_000000000042.jpg"),
        ("test2015", "test", "COCO_test2015_000000000042.jpg"),
        ("train2014", "train", "COCO_train2014_000000000042.jpg"),
    ],
)
def test_the_file_names_its_images(tmp_path: Path, subtype: str, split: str, image: str) -> None:
    exam = opened(tmp_path, None, subtype=subtype)
    assert (exam.split, exam.questions[0].image, exam.has_answers) == (split, image, False)


def test_annotations_go_by_id_and_may_be_more(tmp_path: Path) -> None:
    asked = [{**ASKED[0], "question_id": number} for number in (2, 1)]
    said = [annotation(*[str(number)] * 10, number=number, kind="number") for number in (1, 2, 3)]
    assert [one.expected for one in opened(tmp_path, said, asked).questions] == ["2", "1"]


@pytest.mark.parametrize(
    ("annotations", "changes", "said"),
    [
        ([annotation(*["a"] * 9)], {}, "record 0 of 'annotations': its 'answers' hold 9 answers, not 10"),
        (
            [annotation(*["a"] * 10, number=1)],
            {},
            "1 of the 1 questions have no annotation, the first is 42000",
        ),
        ([annotation(*["a"] * 10)] * 2, {}, "question 42000 is there twice"),
        ([annotation(*["a"] * 10)], {"annotated": "train2014"}, "annotations of train2014"),
        (None, {"split": "test"}, "is val2014, and the split asked for is test"),
        (None, {"asked": [*ASKED, *ASKED]}, "question 42000 is there twice"),
        (
            None,
            {"asked": [{"question_id": 1, "question": "?"}]},
            "record 0 of 'questions': has no 'image_id'",
        ),
        (None, {"asked": []}, "holds no records"),
        (None, {"subtype": 5}, "has no 'data_subtype'"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, annotations: list[dict[str, Any]] | None, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened(tmp_path, annotations, **changes)


def test_annotations_in_the_place_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data_subtype": "val2014", "annotations": []}))
    with pytest.raises(DataError, match="looks like VQAv2's annotations"):
        read_vqav2(TaskFiles(questions=path))


def unanswered(*ids: str) -> Benchmark:
    questions = tuple(Question(id, None, "?", "?") for id in ids)
    return Benchmark(task="vqav2", split="test", questions=questions, known=frozenset(ids))


def test_a_submission_holds_every_question_in_order(tmp_path: Path) -> None:
    path = tmp_path / "out" / "submission.json"
    unanswered("3", "1").write_submission({"1": "Two.", "3": "Yes"}, path)
    assert json.loads(path.read_text()) == [
        {"question_id": 3, "answer": "yes"},
        {"question_id": 1, "answer": "2"},
    ]


@pytest.mark.parametrize(
    ("ids", "answers", "said"),
    [
        (("1", "2", "3"), {"2": "a"}, "2 of the 3 questions have no answer, the first is 1"),
        (("1",), {"1": "a", "2": "b"}, "1 answers are for other questions, such as 2"),
        (("x",), {"x": "a"}, "question id 'x' is no number"),
    ],
)
def test_an_incomplete_submission_is_not_written(
    tmp_path: Path, ids: tuple[str, ...], answers: dict[str, str], said: str
) -> None:
    path = tmp_path / "submission.json"
    path.write_text("before")
    with pytest.raises(DataError, match=said):
        unanswered(*ids).write_submission(answers, path)
    assert path.read_text() == "before"


def test_an_annotation_of_another_image_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"question 42000 is of image 7, and the question is about COCO_val2014_0"
    ):
        opened(tmp_path, [{**annotation(*["yes"] * 10), "image_id": 7}])

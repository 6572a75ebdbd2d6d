"""Benchmarks from files: what is read, how answers score, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import (
    TaskFiles,
    read_custom,
    read_gqa,
    read_scienceqa,
    read_textvqa,
    read_vqav2,
)
from evals.vqa.scoring import Benchmark, BenchmarkQuestion, Rule, exact_or_soft, letter, score_exact
from radio.errors import DataError


def gqa_record(answer: str | None, structural: str = "query", **changes: Any) -> dict[str, Any]:
    found = {
        "question": "What is it?",
        "imageId": "n161313",
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "obj", "detailed": "x"},
    }
    return {**found, **({} if answer is None else {"answer": answer}), **changes}


def opened_gqa(
    tmp_path: Path, data: Any, name: str = "val_balanced_questions.json", split: str | None = None
) -> Benchmark:
    path = tmp_path / name
    path.write_text(json.dumps(data))
    return read_gqa(TaskFiles(questions=path, split=split))


def test_questions_and_their_groups(tmp_path: Path) -> None:
    exam = opened_gqa(tmp_path, {"b1": gqa_record("cat"), "a2": gqa_record("yes", "verify")})
    prompt = "What is it?\nAnswer the question using a single word or phrase."
    assert [(one.id, one.image, one.text, one.prompt) for one in exam.questions] == [
        ("b1", "n161313.jpg", "What is it?", prompt),
        ("a2", "n161313.jpg", "What is it?", prompt),
    ]
    assert tuple(question.expected for question in exam.questions) == ("cat", "yes")
    assert exam.groups["structural"] == ("query", "verify")
    assert exam.groups["form"] == ("open", "binary")
    assert not exam.missing_is_wrong


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("cat", 1),
        ("Cat.", 1),
        ("cat...", 1),
        ("a cat", 0),
        ("cats", 0),
        ("cat .", 0),
        (".cat", 0),
        ("", 0),
    ],
)
def test_exact_match_without_the_full_stop(tmp_path: Path, answer: str, worth: float) -> None:
    assert opened_gqa(tmp_path, {"1": gqa_record("cat")}).questions[0].score(answer) == worth


def test_full_stops_at_the_end_are_dropped() -> None:
    assert score_exact("The U.S.A. ..", "the u.s.a. ") == 1


def test_only_balanced_questions_are_scored(tmp_path: Path) -> None:
    exam = opened_gqa(tmp_path, {"1": gqa_record("cat"), "2": gqa_record("dog", isBalanced=False)})
    assert [question.id for question in exam.questions] == ["1"]
    assert exam.known == {"1", "2"}
    with pytest.raises(DataError, match="none of its 1 questions is balanced"):
        opened_gqa(tmp_path, {"2": gqa_record("dog", isBalanced=False)})


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("val_balanced_questions.json", "val"),
        ("testdev_balanced_questions.json", "testdev"),
        ("test_balanced_questions.json", "test"),
        ("challenge_all_questions.json", "challenge"),
    ],
)
def test_the_name_says_the_split(tmp_path: Path, name: str, split: str) -> None:
    assert opened_gqa(tmp_path, {"1": gqa_record("cat")}, name).split == split


def test_a_split_has_to_be_known(tmp_path: Path) -> None:
    data = {"1": gqa_record("cat")}
    assert opened_gqa(tmp_path, data, "mine.json", "testdev").split == "testdev"
    with pytest.raises(DataError, match="its name does not say which split it is"):
        opened_gqa(tmp_path, data, "mine.json")
    with pytest.raises(DataError, match="is val by its name, and the split asked for is testdev"):
        opened_gqa(tmp_path, data, split="testdev")


def test_answers_and_types_may_be_absent(tmp_path: Path) -> None:
    exam = opened_gqa(tmp_path, {"1": gqa_record(None, types=None), "2": gqa_record(None, types={})})
    assert not exam.has_answers and exam.groups == {}
    with pytest.raises(DataError, match="record 2: has no 'answer'"):
        opened_gqa(tmp_path, {"1": gqa_record("cat"), "2": gqa_record(None)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"1": {"question": "?", "isBalanced": True}}, "record 1: has no 'imageId'"),
        ({"1": {"question": "?", "imageId": "2"}}, "record 1: has no 'isBalanced'"),
        ({"questions": [{"question_id": 1}]}, "record questions: .* looks like VQAv2's questions"),
        ([{"conversations": []}], "record 0: .* looks like LLaVA's conversations"),
    ],
)
def test_other_files_than_gqas(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        opened_gqa(tmp_path, data)


ASKED = [{"question_id": 42000, "image_id": 42, "question": "Is it?"}]


def annotation(*answers: str, number: int = 42000, kind: str = "yes/no") -> dict[str, Any]:
    given = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": person}
        for person, answer in enumerate(answers, start=1)
    ]
    return {"question_id": number, "image_id": 42, "answer_type": kind, "answers": given}


def opened_vqav2(
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


def test_vqav2s_questions_and_scores(tmp_path: Path) -> None:
    exam = opened_vqav2(tmp_path, [annotation(*["yes"] * 9, "maybe")])
    (question,) = exam.questions
    assert (question.id, question.image, question.text, question.prompt) == (
        "42000",
        "COCO_val2014_000000000042.jpg",
        "Is it?",
        "Is it?\nAnswer the question using a single word or phrase.",
    )
    assert (exam.split, tuple(question.expected for question in exam.questions)) == ("val", ("yes",))
    assert exam.groups["answer_type"] == ("yes/no",)
    assert exam.questions[0].score("Yes.") == 1.0
    assert exam.questions[0].score("maybe") == pytest.approx(0.3)


def test_unanimous_answers_are_left_alone_by_the_official_rule(tmp_path: Path) -> None:
    said = [annotation(*["yes"] * 10)]
    assert opened_vqav2(tmp_path, said).questions[0].score("Yes") == 0.0
    assert opened_vqav2(tmp_path, said, rule="llava").questions[0].score("Yes") == 1.0
    assert opened_vqav2(tmp_path, said, rule="m4c").questions[0].score("Yes") == 1.0


@pytest.mark.parametrize(
    ("subtype", "split", "image"),
    [
        ("test-dev2015", "test-dev", "COCO_test2015_000000000042.jpg"),
        ("test2015", "test", "COCO_test2015_000000000042.jpg"),
        ("train2014", "train", "COCO_train2014_000000000042.jpg"),
    ],
)
def test_the_file_names_its_images(tmp_path: Path, subtype: str, split: str, image: str) -> None:
    exam = opened_vqav2(tmp_path, None, subtype=subtype)
    assert (exam.split, exam.questions[0].image, exam.has_answers) == (split, image, False)


def test_annotations_go_by_id_and_may_be_more(tmp_path: Path) -> None:
    asked = [{**ASKED[0], "question_id": number} for number in (2, 1)]
    said = [annotation(*[str(number)] * 10, number=number, kind="number") for number in (1, 2, 3)]
    assert [one.expected for one in opened_vqav2(tmp_path, said, asked).questions] == ["2", "1"]


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
        (None, {"split": "test"}, "is val by its 'data_subtype', and the split asked for is test"),
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
def test_vqav2_files_that_do_not_fit(
    tmp_path: Path, annotations: list[dict[str, Any]] | None, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened_vqav2(tmp_path, annotations, **changes)


def test_annotations_in_the_place_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data_subtype": "val2014", "annotations": []}))
    with pytest.raises(DataError, match="looks like VQAv2's annotations"):
        read_vqav2(TaskFiles(questions=path))


def unanswered(*ids: str) -> Benchmark:
    questions = tuple(BenchmarkQuestion(id, None, "?", "?") for id in ids)
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
        opened_vqav2(tmp_path, [{**annotation(*["yes"] * 10), "image_id": 7}])


def text_record(**changes: Any) -> dict[str, Any]:
    found = {
        "question_id": 34602,
        "image_id": "003a8ae2ef43b901",
        "question": "what is the brand of this camera?",
        "answers": ["nous les gosses"] + ["dakota"] * 8 + ["dakota digital"],
        "set_name": "val",
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def opened_textvqa(tmp_path: Path, *records: dict[str, Any], tokens: Any = None, **files: Any) -> Benchmark:
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": records}))
    if tokens is not None:
        files["ocr_file"] = tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json"
        files["ocr_file"].write_text(json.dumps({"data": tokens}))
    return read_textvqa(TaskFiles(questions=path, **files))


def test_a_question_and_its_scores(tmp_path: Path) -> None:
    exam = opened_textvqa(tmp_path, text_record())
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
    exam = opened_textvqa(tmp_path, text_record(answers=["Joe's Bar"] * 10))
    assert exam.questions[0].score("the joe's bar!") == 1.0


CAMERA = (
    "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL\n"
    "Answer the question using a single word or phrase."
)


def test_ocr_tokens_from_the_record_or_from_a_file(tmp_path: Path) -> None:
    own = opened_textvqa(tmp_path, text_record(ocr_tokens=["DAKOTA", "DIGITAL"]), ocr=True)
    assert own.questions[0].prompt == CAMERA
    tokens = [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": []}]
    assert opened_textvqa(tmp_path, text_record(), tokens=tokens, ocr=True).questions[0].prompt == CAMERA
    assert "Reference" not in opened_textvqa(tmp_path, text_record(ocr_tokens=["DAKOTA"])).questions[0].prompt
    empty = opened_textvqa(tmp_path, text_record(ocr_tokens=[]), ocr=True)
    assert "camera?\nReference OCR token: \nAnswer" in empty.questions[0].prompt


@pytest.mark.parametrize(
    ("records", "files", "said"),
    [
        (
            [text_record()],
            {"ocr": True},
            "hold no 'ocr_tokens'; give the file of OCR tokens, or turn OCR off",
        ),
        ([text_record()], {"tokens": []}, "given and not asked for"),
        (
            [text_record()],
            {"tokens": [{"image_id": "x", "ocr_tokens": []}], "ocr": True},
            "has no tokens for 1 images .* the first is 003a8ae2ef43b901",
        ),
        (
            [text_record(answers=["a"] * 9)],
            {},
            "record 0 of 'data': its 'answers' hold 9 answers, not 10",
        ),
        ([text_record(), text_record()], {}, "question 34602 is there twice"),
        (
            [text_record(), text_record(question_id=1, answers=None)],
            {},
            "record 1 of 'data': has no 'answers'",
        ),
        ([text_record(image_id=None)], {}, "has no 'image_id'"),
        ([text_record(set_name=None)], {}, "does not say which split it is"),
        ([text_record()], {"split": "train"}, "is val by its content, and the split asked for is train"),
    ],
)
def test_textvqa_files_that_do_not_fit(
    tmp_path: Path, records: list[dict[str, Any]], files: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened_textvqa(tmp_path, *records, **files)


def test_a_test_set_has_no_answers(tmp_path: Path) -> None:
    exam = opened_textvqa(tmp_path, text_record(answers=None, set_name=None), split="test")
    assert (exam.split, exam.has_answers) == ("test", False)


def problem(**changes: Any) -> dict[str, Any]:
    return {
        "question": "Which is it?",
        "choices": ["red", "blue", "green"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "grade": "grade4",
        "subject": "natural science",
        "topic": "physics",
        "split": "test",
        **changes,
    }


def opened_scienceqa(tmp_path: Path, problems: Any, splits: Any = None, **files: Any) -> Benchmark:
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits or {"test": list(problems)}))
    return read_scienceqa(
        TaskFiles(questions=tmp_path / "problems.json", splits=tmp_path / "pid_splits.json", **files)
    )


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", "B"),
        (" B", None),  # LLaVA looks at the text as it is
        ("B\n", None),
        (" B. blue", None),
        ("B. blue", "B"),
        ("E. ", "E"),
        ("E.\n", None),
        ("E. x", "E"),
        ("It is dark. The answer is B.", "B"),
        ("The answer is B. The answer is C.", None),
        ("The answer is B. The answer is B.", None),
        ("The answer is B", None),
        ("The answer is B\n", None),
        ("The answer is B!", "B"),
        ("The answer is B, not C.", "B"),
        ("The answer is Blue.", "B"),  # so LLaVA's pattern has it: any sign behind the letter
        ("The answer is F.", "F"),
        ("The answer is B! The answer is B?", None),
        ("the answer is B.", None),
        ("F", None),
        ("F. other", None),
        ("b", None),
        ("B.", None),
        ("B.blue", None),
        ("B) blue", None),
        ("(B)", None),
        ("AB", None),
        ("blue", None),
        ("", None),
    ],
)
def test_three_forms_of_an_answer(answer: str, chosen: str | None) -> None:
    assert letter(answer) == chosen


def test_prompts_and_images(tmp_path: Path) -> None:
    exam = opened_scienceqa(tmp_path, {"5": problem(), "7": problem(hint=" Look. ", choices=["x", "y"])})
    end = "Answer with the option's letter from the given choices directly."
    assert exam.questions[0].prompt == f"Which is it?\nA. red\nB. blue\nC. green\n{end}"
    assert exam.questions[1].prompt == f"Context: Look.\nWhich is it?\nA. x\nB. y\n{end}"
    assert [question.image for question in exam.questions] == ["test/5/image.png", "test/7/image.png"]
    assert tuple(question.expected for question in exam.questions) == ("B", "B")


def test_the_images_of_one_split_alone(tmp_path: Path) -> None:
    (tmp_path / "images" / "test").mkdir(parents=True)
    for folder, image in (("images", "test/5/image.png"), ("images/test", "5/image.png")):
        exam = opened_scienceqa(tmp_path, {"5": problem()}, images=tmp_path / folder)
        assert exam.questions[0].image == image


@pytest.mark.parametrize(
    ("answer", "worth"),
    [("B", 1), ("B. anything", 1), ("A", 0), ("D", 0), ("The answer is Z.", 0), ("blue", 0)],
)
def test_scores_of_answers(tmp_path: Path, answer: str, worth: float) -> None:
    exam = opened_scienceqa(tmp_path, {"5": problem()})
    assert exam.questions[0].score(answer) == worth
    assert exam.missing_is_wrong


def test_only_problems_with_a_image_of_the_split(tmp_path: Path) -> None:
    problems = {"1": problem(), "2": problem(image=None), "3": problem(), "4": problem(split="val")}
    splits = {"test": ["3", "2", "1"], "minitest": ["1"], "val": ["4"]}
    exam = opened_scienceqa(tmp_path, problems, splits)
    assert [question.id for question in exam.questions] == ["3", "1"]  # in the order of the split
    assert (exam.split, exam.known) == ("test", {"1", "2", "3"})
    small = opened_scienceqa(tmp_path, problems, splits, split="minitest")
    assert [question.image for question in small.questions] == ["test/1/image.png"]


def test_groups(tmp_path: Path) -> None:
    exam = opened_scienceqa(tmp_path, {"1": problem(), "2": problem(grade="grade11", topic="maps")})
    assert exam.groups["subject"] == ("natural science",) * 2
    assert exam.groups["grade"] == ("1-6", "7-12")
    assert exam.groups["topic"] == ("physics", "maps")
    assert not any("topic" in name for name in exam.score({}).metrics())  # too many: only in the table
    assert dict(opened_scienceqa(tmp_path, {"1": problem(subject="", grade=None, topic=3)}).groups) == {}


@pytest.mark.parametrize(
    ("problems", "splits", "files", "said"),
    [
        ({"1": problem(answer=3)}, None, {}, "record 1: its 'answer' is 3, and it has 3 choices"),
        ({"1": problem(choices=list("abcdef"))}, None, {}, "has 6 choices"),
        ({"1": problem(choices="abc")}, None, {}, "record 1: its 'choices' is 'abc', not a list"),
        ({"1": problem(image=None)}, None, {}, "no problem of test has an image"),
        (
            {"1": problem()},
            {"test": ["1", "9"]},
            {},
            "has no problem 9, which pid_splits.json lists under test",
        ),
        ({"1": problem()}, None, {"split": "tset"}, "has no split 'tset'; there are test; did you mean test"),
        ({"1": problem()}, ["1"], {}, "wanted ScienceQA's splits"),
        ({"1": {"imageId": "2"}}, {"test": ["1"]}, {}, "record 1: .* looks like GQA's questions"),
    ],
)
def test_scienceqa_files_that_do_not_fit(
    tmp_path: Path, problems: Any, splits: Any, files: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened_scienceqa(tmp_path, problems, splits, **files)


def test_splits_are_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give pid_splits\.json too"):
        read_scienceqa(TaskFiles(questions=tmp_path / "problems.json"))


SHORT = "Answer the question using a single word or phrase."


def opened_custom(tmp_path: Path, *rows: Any, text: str | None = None) -> Benchmark:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text)
    return read_custom(TaskFiles(questions=path))


def test_a_line_a_question(tmp_path: Path) -> None:
    exam = opened_custom(
        tmp_path,
        {"image": "deep/a.webp", "question": "What is it?", "answer": "A red  cat."},
        {"id": 7, "question": "Where?", "answers": ["here", "there", "there"], "image": None},
        {"id": "x", "question": "Which?", "choices": ["red", "blue"], "answer": "blue"},
    )
    assert [(one.id, one.image, one.prompt) for one in exam.questions] == [
        ("1", "deep/a.webp", f"What is it?\n{SHORT}"),
        ("7", None, f"Where?\n{SHORT}"),
        (
            "x",
            None,
            "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
        ),
    ]
    assert (exam.split, tuple(question.expected for question in exam.questions)) == (
        "own",
        ("A red  cat.", "there", "B"),
    )
    assert [one.score("red cat") for one in exam.questions[:2]] == [1.0, 0.0]
    assert [exam.questions[1].score(answer) for answer in ("Here!", "the there", "nowhere")] == [
        1.0,
        1.0,
        0.0,
    ]
    assert [exam.questions[2].score(answer) for answer in ("B", "B. blue", "A", "blue")] == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    assert dict(exam.groups) == {}
    array = json.dumps([{"question": "?", "answer": "a", "category": "c"}], indent=1)
    assert opened_custom(tmp_path, text=f"\ufeff{array}").groups["category"] == ("c",)


@pytest.mark.parametrize(
    ("answer", "truths", "worth"),
    [
        ("Yes.", ["yes"], 1.0),
        ("2", ["two", "three"], 1.0),
        ("a dog", ["cat"], 0.0),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("YES", ["yes"] * 10, 1.0),
        ("yes", ["yes"] * 9, 1.0),
        ("yes", ["yes"] + ["no"] * 8, 1.0),  # nine people: any of them
    ],
)
def test_exact_below_ten_answers_and_soft_from_ten_on(answer: str, truths: list[str], worth: float) -> None:
    assert exact_or_soft(answer, truths) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no questions; wanted"),
        ([{"question": "?"}], r"own\.jsonl: line 1: wanted a question with one or more answers"),
        ([{"question": "?", "answers": []}], "one or more answers, none of them empty"),
        ([{"question": "?", "answer": " "}], "none of them empty"),
        ([{"question": "", "answer": "a"}], "none of them empty"),
        ([{"question": "?", "answer": 3}], "line 1: answer: input should be a valid string, got 3"),
        ([{"answer": "a"}], "line 1: question: field required"),
        ([{"question": "?", "answer": "a", "image": ["a"]}], "line 1: image: input should be a valid string"),
        ([{"question": "?", "answer": "c", "choices": ["a", "b"]}], "line 1: wanted 2 to 5 choices, and one"),
        ([{"question": "?", "answer": "a", "choices": ["a"]}], "line 1: wanted 2 to 5 choices"),
        (
            [{"question": "?", "answer": "a"}] * 2 + [{"id": 2, "question": "?", "answer": "a"}],
            "the id 2; each",
        ),
        ([3], "line 1: input should be a valid dictionary, got 3"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened_custom(tmp_path, *rows)


def test_categories_are_scores_and_there_are_not_thousands(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": "a", "category": f"{n}"} for n in range(201)]
    exam = opened_custom(tmp_path, *rows[:200])
    assert len(exam.groups["category"]) == 200
    with pytest.raises(DataError, match="has 201 categories; wanted 200 at most"):
        opened_custom(tmp_path, *rows)


def test_an_answer_that_normalising_leaves_nothing_of_is_not_given_by_silence() -> None:
    assert [exact_or_soft(said, ["the"]) for said in ("The", "", "?")] == [1.0, 0.0, 0.0]

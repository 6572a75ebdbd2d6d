from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import TaskFiles, read_gqa
from evals.vqa.scoring import Benchmark, score_exact
from radio.errors import DataError


def record(answer: str | None, structural: str = "query", **changes: Any) -> dict[str, Any]:
    found = {
        "question": "What is it?",
        "imageId": "n161313",
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "obj", "detailed": "x"},
    }
    return {**found, **({} if answer is None else {"answer": answer}), **changes}


def opened(
    tmp_path: Path, data: Any, name: str = "val_balanced_questions.json", split: str | None = None
) -> Benchmark:
    path = tmp_path / name
    path.write_text(json.dumps(data))
    return read_gqa(TaskFiles(questions=path, split=split))


def test_questions_and_their_groups(tmp_path: Path) -> None:
    exam = opened(tmp_path, {"b1": record("cat"), "a2": record("yes", "verify")})
    prompt = "What is it?\nAnswer the question using a single word or phrase."
    assert [(one.id, one.image, one.text, one.prompt) for one in exam.questions] == [
        ("b1", "n161313.jpg", "What is it?", prompt),
        ("a2", "n161313.jpg", "What is it?", prompt),
    ]
    assert tuple(question.expected for question in exam.questions) == ("cat", "yes")
    assert exam.groups["structural"].labels == ("query", "verify")
    assert exam.groups["form"].labels == ("open", "binary")
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
    assert opened(tmp_path, {"1": record("cat")}).questions[0].score(answer) == worth


def test_full_stops_at_the_end_are_dropped() -> None:
    assert score_exact("The U.S.A. ..", "the u.s.a. ") == 1


def test_only_balanced_questions_are_scored(tmp_path: Path) -> None:
    exam = opened(tmp_path, {"1": record("cat"), "2": record("dog", isBalanced=False)})
    assert [question.id for question in exam.questions] == ["1"]
    assert exam.known == {"1", "2"}
    with pytest.raises(DataError, match="none of its 1 questions is balanced"):
        opened(tmp_path, {"2": record("dog", isBalanced=False)})


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
    assert opened(tmp_path, {"1": record("cat")}, name).split == split


def test_a_split_has_to_be_known(tmp_path: Path) -> None:
    data = {"1": record("cat")}
    assert opened(tmp_path, data, "mine.json", "testdev").split == "testdev"
    with pytest.raises(DataError, match="the name does not say the split"):
        opened(tmp_path, data, "mine.json")
    with pytest.raises(DataError, match="is called val, and the split asked for is testdev"):
        opened(tmp_path, data, split="testdev")


def test_answers_and_types_may_be_absent(tmp_path: Path) -> None:
    exam = opened(tmp_path, {"1": record(None, types=None), "2": record(None, types={})})
    assert not exam.has_answers and exam.groups == {}
    with pytest.raises(DataError, match="record 2: has no 'answer'"):
        opened(tmp_path, {"1": record("cat"), "2": record(None)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"1": {"question": "?", "isBalanced": True}}, "record 1: has no 'imageId'"),
        ({"1": {"question": "?", "imageId": "2"}}, "record 1: has no 'isBalanced'"),
        ({"questions": [{"question_id": 1}]}, "record questions: .* looks like VQAv2's questions"),
        ([{"conversations": []}], "record 0: .* looks like LLaVA's conversations"),
    ],
)
def test_other_files(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        opened(tmp_path, data)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import TaskFiles, read_scienceqa
from evals.vqa.scoring import Benchmark, letter
from radio.errors import DataError


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


def opened(tmp_path: Path, problems: Any, splits: Any = None, **files: Any) -> Benchmark:
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
    exam = opened(tmp_path, {"5": problem(), "7": problem(hint=" Look. ", choices=["x", "y"])})
    end = "Answer with the option's letter from the given choices directly."
    assert exam.questions[0].prompt == f"Which is it?\nA. red\nB. blue\nC. green\n{end}"
    assert exam.questions[1].prompt == f"Context: Look.\nWhich is it?\nA. x\nB. y\n{end}"
    assert [question.image for question in exam.questions] == ["test/5/image.png", "test/7/image.png"]
    assert tuple(question.expected for question in exam.questions) == ("B", "B")


def test_the_images_of_one_split_alone(tmp_path: Path) -> None:
    (tmp_path / "images" / "test").mkdir(parents=True)
    for folder, image in (("images", "test/5/image.png"), ("images/test", "5/image.png")):
        exam = opened(tmp_path, {"5": problem()}, images=tmp_path / folder)
        assert exam.questions[0].image == image


@pytest.mark.parametrize(
    ("answer", "worth"),
    [("B", 1), ("B. anything", 1), ("A", 0), ("D", 0), ("The answer is Z.", 0), ("blue", 0)],
)
def test_scores_of_answers(tmp_path: Path, answer: str, worth: float) -> None:
    exam = opened(tmp_path, {"5": problem()})
    assert exam.questions[0].score(answer) == worth
    assert exam.missing_is_wrong


def test_only_problems_with_a_image_of_the_split(tmp_path: Path) -> None:
    problems = {"1": problem(), "2": problem(image=None), "3": problem(), "4": problem(split="val")}
    splits = {"test": ["3", "2", "1"], "minitest": ["1"], "val": ["4"]}
    exam = opened(tmp_path, problems, splits)
    assert [question.id for question in exam.questions] == ["3", "1"]  # in the order of the split
    assert (exam.split, exam.known) == ("test", {"1", "2", "3"})
    small = opened(tmp_path, problems, splits, split="minitest")
    assert [question.image for question in small.questions] == ["test/1/image.png"]


def test_groups(tmp_path: Path) -> None:
    exam = opened(tmp_path, {"1": problem(), "2": problem(grade="grade11", topic="maps")})
    assert exam.groups["subject"].labels == ("natural science",) * 2
    assert exam.groups["grade"].labels == ("1-6", "7-12")
    assert (exam.groups["topic"].labels, exam.groups["topic"].as_metrics) == (("physics", "maps"), False)
    assert dict(opened(tmp_path, {"1": problem(subject="", grade=None, topic=3)}).groups) == {}


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
def test_files_that_do_not_fit(
    tmp_path: Path, problems: Any, splits: Any, files: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        opened(tmp_path, problems, splits, **files)


def test_splits_are_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give pid_splits\.json too"):
        read_scienceqa(TaskFiles(questions=tmp_path / "problems.json"))

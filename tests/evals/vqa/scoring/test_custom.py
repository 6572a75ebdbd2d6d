"""Questions of one's own: what a line may hold, and what an answer is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import TaskFiles, read_custom
from evals.vqa.scoring import Benchmark, exact_or_soft
from radio.errors import DataError

SHORT = "Answer the question using a single word or phrase."


def opened(tmp_path: Path, *rows: Any, text: str | None = None) -> Benchmark:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if text is None else text)
    return read_custom(TaskFiles(questions=path))


def test_a_line_a_question(tmp_path: Path) -> None:
    exam = opened(
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
    assert opened(tmp_path, text=f"\ufeff{array}").groups["category"].labels == ("c",)


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
        opened(tmp_path, *rows)


def test_categories_are_scores_and_there_are_not_thousands(tmp_path: Path) -> None:
    exam = opened(tmp_path, *({"question": "?", "answer": "a", "category": f"{n}"} for n in range(200)))
    assert len(exam.groups["category"].labels) == 200
    with pytest.raises(DataError, match="has 201 categories; wanted 200 at most"):
        opened(tmp_path, *({"question": "?", "answer": "a", "category": f"{n}"} for n in range(201)))


def test_an_answer_that_normalising_leaves_nothing_of_is_not_given_by_silence() -> None:
    assert [exact_or_soft(said, ["the"]) for said in ("The", "", "?")] == [1.0, 0.0, 0.0]

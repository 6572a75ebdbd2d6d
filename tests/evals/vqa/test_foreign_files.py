"""Whatever other people's files hold: a right reading, or one error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evals.vqa.benchmarks import TaskFiles, open_benchmark
from evals.vqa.data import read_records
from evals.vqa.records import read_predictions
from radio.errors import RadioError

TEN = [{"answer": "red", "answer_id": n} for n in range(10)]
GOOD: dict[str, dict[str, Any]] = {
    "conversations": {
        "data.json": [
            {
                "id": "1",
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "A cat."},
                ],
            },
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
        ]
    },
    "predictions": {"data.json": [{"question_id": 7, "answer": "a"}, {"questionId": "8", "prediction": "b"}]},
    "gqa": {
        "val_questions.json": {
            "1": {
                "question": "Red?",
                "imageId": "5",
                "isBalanced": True,
                "answer": "yes",
                "types": {"structural": "verify", "semantic": "attr"},
            }
        }
    },
    "custom": {
        "questions.json": [
            {"image": "a.png", "question": "Red?", "answer": "yes", "category": "c"},
            {"id": 7, "question": "Who?", "choices": ["a", "b"], "answers": ["b"]},
        ]
    },
    "vqav2": {
        "questions.json": {
            "data_subtype": "val2014",
            "questions": [{"question_id": 1, "image_id": 5, "question": "Red?"}],
        },
        "annotations.json": {
            "data_subtype": "val2014",
            "annotations": [{"question_id": 1, "answer_type": "yes/no", "answers": TEN}],
        },
    },
    "textvqa": {
        "questions.json": {
            "dataset_type": "val",
            "data": [{"question_id": 1, "image_id": "5", "question": "red?", "answers": ["a"] * 10}],
        },
        "ocr_file.json": {"data": [{"image_id": "5", "ocr_tokens": ["A"]}]},
    },
    "scienceqa": {
        "questions.json": {
            "1": {
                "question": "Red?",
                "choices": ["a", "b"],
                "answer": 1,
                "hint": "",
                "image": "i.png",
                "grade": "grade1",
                "split": "test",
            }
        },
        "splits.json": {"test": ["1"]},
    },
}
NESTED = "deep"  # stands for a value that is nested 100,000 deep
VALUES = st.sampled_from(
    [None, True, -1, 0, 1.5, 10**15, 10**300, "", "x" * 300, "../../x", "/x", "a\0", "\ud83d", [], [[]], {}]
) | st.just(NESTED)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        found += [place for key, part in inside for place in places(part, (*path, key))]
    return found


def altered(good: Any, place: tuple[Any, ...], how: str, value: Any) -> Any:
    """The value with one place replaced, taken out, or there twice."""
    if not place:
        return value
    found = copy.deepcopy(good)
    parent = found
    for key in place[:-1]:
        parent = parent[key]
    if how == "without":
        del parent[place[-1]]
    elif how == "twice" and isinstance(parent, list):
        parent.append(parent[place[-1]])
    else:
        parent[place[-1]] = value
    return found


def damaged(text: str, how: str) -> bytes:
    """The text as bytes, some of them not as they ought to be."""
    data = text.replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000).encode("utf-8", "surrogatepass")
    return {
        "whole": data,
        "cut": data[: len(data) // 2],
        "byte-order mark": b"\xef\xbb\xbf" + data,
        "utf-16": text.encode("utf-16", "surrogatepass"),
        "latin-1": data + b"\xe9",
        "digits": data.replace(b"1", b"9" * 5000),
        "not a number": data.replace(b"1", b"NaN"),
        "empty": b"",
        "zeros": bytes(100),
    }[how]


BYTES = st.just("whole") | st.sampled_from(
    ["cut", "byte-order mark", "utf-16", "latin-1", "digits", "not a number", "empty", "zeros"]
)


def use(kind: str, folder: Path) -> None:
    """Read the files as an evaluation does, and use what is read."""
    (first, *others) = (folder / name for name in GOOD[kind])
    if kind == "conversations":
        for record in read_records(first, lambda name: name == "a.png").records:
            json.dumps(record, ensure_ascii=False).encode()
            assert record.turns and all(turn.answer for turn in record.turns)
        return
    if kind == "predictions":
        for pair in read_predictions(first).items():
            assert all(isinstance(text, str) and text.encode() is not None for text in pair)
        return
    files = TaskFiles(questions=first, **{path.stem: path for path in others}, ocr=kind == "textvqa")
    data = open_benchmark(kind, files)  # type: ignore[arg-type]
    if data.has_answers:
        scores = data.score({question.id: "yes" for question in data.questions})
        assert all(0 <= metric.value <= 100 for metric in scores.metrics().values())
        scores.tables(kind)


@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(data=None)
@given(data=st.data())
def test_a_right_reading_or_one_error(kind: str, data: st.DataObject | None, tmp_path: Path) -> None:
    files = dict(GOOD[kind])
    how = "whole"
    which = next(iter(files))
    if data is not None:
        which = data.draw(st.sampled_from(list(files)))
        place = data.draw(st.sampled_from(places(files[which])))
        change = data.draw(st.sampled_from(["other", "other", "without", "twice"]))
        files[which] = altered(files[which], place, change, data.draw(VALUES))
        how = data.draw(BYTES)
    for name, content in files.items():
        text = json.dumps(content)
        (tmp_path / name).write_bytes(damaged(text, how if name == which else "whole"))
    if data is None:
        use(kind, tmp_path)  # the files as they are meant
        return
    try:
        use(kind, tmp_path)
    except RadioError as error:
        assert len(str(error)) < 1500  # noqa: PT017 (one of two outcomes)


@pytest.mark.parametrize("kind", ["gqa", "scienceqa"])
def test_an_id_that_is_there_twice(kind: str, tmp_path: Path) -> None:
    for name, content in GOOD[kind].items():
        text = json.dumps(content)
        if content.get("1"):
            text = f"{text[:-1]}, {text[1:]}"
        (tmp_path / name).write_text(text)
    with pytest.raises(RadioError, match="it holds the key '1' twice in one object"):
        use(kind, tmp_path)

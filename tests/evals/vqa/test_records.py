"""Records and predictions from JSON files of others, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.records import Records, Row, read_predictions
from radio.errors import DataError


def records_of(tmp_path: Path, data: Any) -> Records:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data))
    return Records(path, "metadata", "{metadata: [{id, name}]}")


def test_records_of_a_list_and_of_an_object(tmp_path: Path) -> None:
    listed = records_of(tmp_path, {"metadata": [{"id": 7}], "set": "red"})
    assert listed.rows("metadata") == [Row("0", "record 0 of 'metadata'", {"id": 7})]
    assert (listed.top("set"), listed.top("none"), listed.top("metadata")) == ("red", None, None)
    assert records_of(tmp_path, {"x": {"id": 7}}).rows() == [Row("x", "record x", {"id": 7})]


@pytest.mark.parametrize("data", [{"metadata": []}, {"metadata": [3]}, {"metadata": "red"}, [], 5, {}])
def test_lists_that_are_none(tmp_path: Path, data: Any) -> None:
    with pytest.raises(DataError, match=r"file\.json: .*wanted metadata, which are \{metadata:"):
        records_of(tmp_path, data).rows("metadata")


@pytest.mark.parametrize("data", [{}, {"x": 3}, [{"id": 7}]])
def test_objects_that_are_none(tmp_path: Path, data: Any) -> None:
    with pytest.raises(DataError, match=r"wanted metadata"):
        records_of(tmp_path, data).rows()


def test_fields_have_their_types(tmp_path: Path) -> None:
    records = records_of(tmp_path, {})
    row = Row("0", "record 0", {"n": 3, "t": "three", "b": True, "l": ["a"], "m": ["a", 1]})
    assert records.get(row, "n", int) == 3
    assert records.get(row, "b", bool) is True
    assert (records.identity(row, "n"), records.identity(row, "t")) == ("3", "three")
    assert records.texts(row, "l") == ("a",)
    for read, said in (
        (lambda: records.get(row, "x", int), "record 0: has no 'x'"),
        (lambda: records.get(row, "n", str), "its 'n' is 3, not a str"),
        (lambda: records.get(row, "b", int), "its 'b' is True, not a int"),
        (lambda: records.identity(row, "l"), "not a int"),
        (lambda: records.texts(row, "m"), "something else than texts"),
        (lambda: records.unique(["a", "b", "a"]), "question a is there twice"),
    ):
        with pytest.raises(DataError, match=said):
            read()


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        ({"questions": []}, "VQAv2's questions"),
        ({"annotations": []}, "VQAv2's annotations"),
        ({"data": [{"question": "?"}]}, "TextVQA's questions"),
        ({"data": [{"ocr_tokens": []}]}, "OCR tokens"),
        ({"1": {"imageId": "2"}}, "GQA's questions"),
        ({"1": {"choices": []}}, "ScienceQA's problems"),
        ({"test": ["1"]}, "ScienceQA's splits"),
        ([{"conversations": []}], "LLaVA's conversations"),
        ([{"question_id": 1, "answer": "a"}], "predictions"),
    ],
)
def test_an_error_says_what_the_file_looks_like(tmp_path: Path, data: Any, seen: str) -> None:
    with pytest.raises(DataError, match=f"the file looks like {seen}"):
        records_of(tmp_path, data).rows("metadata")


def test_records_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Records(tmp_path / "absent.json", "metadata", "")
    (tmp_path / "part.json").write_text('{"metadata": [')
    with pytest.raises(DataError, match="is not JSON"):
        Records(tmp_path / "part.json", "metadata", "")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


LINES = '{"question_id": 7, "answer": "a\u2028b"}\n\n{"question_id": "x", "answer": ""}\n'


def test_lines_and_arrays(tmp_path: Path) -> None:
    assert read_predictions(written(tmp_path, LINES)) == {"7": "a\u2028b", "x": ""}
    array = json.dumps([{"question_id": 7, "answer": "a"}, {"question_id": 8, "answer": "b"}], indent=1)
    assert read_predictions(written(tmp_path, array)) == {"7": "a", "8": "b"}


def test_the_forms_of_gqa_and_of_llava(tmp_path: Path) -> None:
    assert read_predictions(written(tmp_path, '[{"questionId": "7", "prediction": "a"}]')) == {"7": "a"}
    line = '{"question_id": "7", "prompt": "?", "text": "a", "answer_id": "z", "model_id": "m"}'
    assert read_predictions(written(tmp_path, line)) == {"7": "a"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no predictions"),
        ("[]", "holds no predictions"),
        ('{"question_id": 1, "answer": "a"}\n{"question_id"', "line 2: is not JSON"),
        ('[{"question_id": 1', "is not JSON"),
        ('{"question_id": 1}', "line 1: wanted .*got {'question_id': 1}"),
        ('{"question_id": 1, "answer": 3}', "line 1: wanted"),
        ('{"question_id": true, "answer": "a"}', "line 1: wanted"),
        ('{"question_id": 1.5, "answer": "a"}', "line 1: wanted"),
        ('["a"]', "record 0: wanted"),
        (
            "".join(f'{{"question_id": {n}, "answer": "a"}}\n' for n in (1, "2", 1, 2, 2)),
            "3 predictions are for a question that is answered before, the first is for 1",
        ),
    ],
)
def test_predictions_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_predictions(written(tmp_path, text))


def test_absent_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "absent.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_predictions(tmp_path / "binary")

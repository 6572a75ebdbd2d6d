from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import Records, Row
from radio.errors import DataError


def opened(tmp_path: Path, data: Any) -> Records:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data))
    return Records(path, "metadata", "{metadata: [{id, name}]}")


def test_records_of_a_list_and_of_an_object(tmp_path: Path) -> None:
    listed = opened(tmp_path, {"metadata": [{"id": 7}], "set": "red"})
    assert listed.listed("metadata") == [Row("0", "record 0 of 'metadata'", {"id": 7})]
    assert (listed.top("set"), listed.top("none"), listed.top("metadata")) == ("red", None, None)
    assert opened(tmp_path, {"x": {"id": 7}}).keyed() == [Row("x", "record x", {"id": 7})]


@pytest.mark.parametrize("data", [{"metadata": []}, {"metadata": [3]}, {"metadata": "red"}, [], 5, {}])
def test_lists_that_are_none(tmp_path: Path, data: Any) -> None:
    with pytest.raises(DataError, match=r"file\.json: .*wanted metadata, which are \{metadata:"):
        opened(tmp_path, data).listed("metadata")


@pytest.mark.parametrize("data", [{}, {"x": 3}, [{"id": 7}]])
def test_objects_that_are_none(tmp_path: Path, data: Any) -> None:
    with pytest.raises(DataError, match=r"wanted metadata"):
        opened(tmp_path, data).keyed()


def test_fields_have_their_types(tmp_path: Path) -> None:
    records = opened(tmp_path, {})
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
        opened(tmp_path, data).listed("metadata")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Records(tmp_path / "absent.json", "metadata", "")
    (tmp_path / "part.json").write_text('{"metadata": [')
    with pytest.raises(DataError, match="is not JSON"):
        Records(tmp_path / "part.json", "metadata", "")

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.vqa.benchmarks import read_predictions
from radio.errors import DataError


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
def test_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_predictions(written(tmp_path, text))


def test_absent_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "absent.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_predictions(tmp_path / "binary")

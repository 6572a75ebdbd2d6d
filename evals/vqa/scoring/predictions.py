"""Predictions in a file: one JSON object a line, or one JSON array as EvalAI and GQA take it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radio.errors import DataError

# Ours and EvalAI's; GQA's; LLaVA's.
_IDS, _ANSWERS = ("question_id", "questionId"), ("answer", "prediction", "text")


def read_predictions(path: Path) -> dict[str, str]:
    """The answer to each question id, in the order of the file.

    A record is {"question_id": …, "answer": …}; GQA's {"questionId", "prediction"} and LLaVA's
    {"question_id", "text"} are read too.

    Raises:
        DataError: no such file, nothing in it, a record that is none, or questions that are answered twice.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of predictions")
    found: dict[str, str] = {}
    twice: list[str] = []
    for where, record in _records(path):
        question, answer = _pair(record, f"{path}: {where}")
        if question in found:
            twice.append(question)
        found[question] = answer
    if twice:
        raise DataError(
            f"{path}: {len(twice)} predictions are for a question that is answered before, the first is "
            f"for {twice[0]}; keep one prediction a question"
        )
    if not found:
        raise DataError(f"{path}: holds no predictions")
    return found


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            for number, record in enumerate(json.loads(text)):
                yield f"record {number}", record
            return
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON, or a part of it ({error})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON ({error})") from error


def _pair(record: Any, where: str) -> tuple[str, str]:
    if isinstance(record, dict):
        question = next((record[key] for key in _IDS if key in record), None)
        answer = next((record[key] for key in _ANSWERS if key in record), None)
        if isinstance(question, int | str) and not isinstance(question, bool) and isinstance(answer, str):
            return str(question), answer
    raise DataError(
        f'{where}: wanted {{"question_id": a number or a text, "answer": a text}}, '
        f"got {json.dumps(record)[:100]}"
    )

"""Files of predictions: one JSON object per line, or one JSON array as for EvalAI and GQA."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from radio.errors import DataError, shown

from .records import read_list

# Ours and EvalAI's; GQA's; LLaVA's.
_IDS, _ANSWERS = ("question_id", "questionId"), ("answer", "prediction", "text")


def read_predictions(path: Path) -> dict[str, str]:
    """Read the answer to each question id, in the order of the file.

    A record is {"question_id": …, "answer": …}; GQA's {"questionId", "prediction"} and LLaVA's
    {"question_id", "text"} are read too.

    Raises:
        DataError: no such file, an empty file, an invalid record, or questions that are answered twice.
    """
    found: dict[str, str] = {}
    twice: list[str] = []
    for where, record in read_list(path):
        question, answer = _pair(record, f"{shown(path)}: {where}")
        if question in found:
            twice.append(question)
        found[question] = answer
    if twice:
        raise DataError(
            f"{shown(path)}: {len(twice)} predictions are for a question that is answered before, the first "
            f"is for {shown(twice[0])}; keep one prediction a question"
        )
    if not found:
        raise DataError(f"{shown(path)}: holds no predictions")
    return found


def _pair(record: Any, where: str) -> tuple[str, str]:
    if isinstance(record, dict):
        question = next((record[key] for key in _IDS if key in record), None)
        answer = next((record[key] for key in _ANSWERS if key in record), None)
        if isinstance(question, int | str) and not isinstance(question, bool) and isinstance(answer, str):
            return str(question), answer
    raise DataError(
        f'{where}: wanted {{"question_id": a number or a text, "answer": a text}}, got {reprlib.repr(record)}'
    )

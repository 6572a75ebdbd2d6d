"""LLaVA's training conversations: read, checked before anything is trained, and turned into learned text.

A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`; the mark
`<image>` in the first question says where the picture stands. Text-only records have neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from radio.errors import DataError

from .prompts import IMAGE, PLAIN, VICUNA_V1, ask

Template = Literal["plain", "v1"]


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Record(NamedTuple):
    """One conversation, about a picture or about none; the mark is taken out of the questions."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


class Piece(NamedTuple):
    """A part of the text that the language model sees, and whether it learns to say it."""

    text: str
    learned: bool


def read_records(path: Path, is_picture: Callable[[str], bool], limit: int | None = None) -> list[Record]:
    """The conversations in a JSON file, each checked.

    Args:
        path: a list of records.
        is_picture: whether there is a picture of that name.
        limit: take so many, evenly spread.

    Raises:
        DataError: no such file, not such a list, or a record that cannot be used; names the first, and says
            how many more there are.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of conversations")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a JSON file, or a part of one ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: wanted a list of LLaVA records with one or more, got {_kind(rows)}")
    if limit is not None and limit < len(rows):
        rows = [rows[place * len(rows) // limit] for place in range(limit)]
    records, wrong = [], []
    for number, row in enumerate(rows):
        problem = _problem(row, is_picture)
        if problem:
            name = row.get("id") if isinstance(row, dict) else None
            wrong.append(f"record {number} (id {name}): {problem}")
        else:
            records.append(_record(row, number))
    if wrong:
        more = f"; {len(wrong) - 1} more records cannot be used" if len(wrong) > 1 else ""
        raise DataError(f"{path}: {wrong[0]}{more}")
    return records


def fingerprint(records: Iterable[Record]) -> str:
    """A hash of all that is learned from, pictures by name."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(json.dumps(record, ensure_ascii=False).encode())
    return sha.hexdigest()


def pieces(record: Record, template: Template, end: str) -> list[Piece]:
    """A record's text, cut where learning begins and ends; `end` is the language model's end of text.

    `plain` shows the picture and its caption alone; `v1` is Vicuna's chat.
    """
    has_image = record.image is not None
    if template == "plain":
        caption = record.turns[0].answer + PLAIN.separators[1]
        return [Piece(ask(PLAIN, "", has_image), False), Piece(caption, True)]
    found: list[Piece] = []
    for number, turn in enumerate(record.turns):
        asked = ask(VICUNA_V1, turn.question, has_image and number == 0)
        if number:  # the system text stands once
            asked = asked.removeprefix(VICUNA_V1.system + VICUNA_V1.separators[0])
        # the blank belongs to the answer: many tokenizers make it one token with the word behind it
        found += [Piece(asked, False), Piece(f" {turn.answer}{end}", True)]
    return found


def _record(row: Any, number: int) -> Record:
    values = [turn["value"] for turn in row["conversations"]]
    turns = tuple(
        Turn(question.replace(IMAGE, "").strip(), answer.strip())
        for question, answer in zip(values[::2], values[1::2], strict=True)
    )
    return Record(str(row.get("id", number)), row.get("image"), turns)


def _problem(row: Any, is_picture: Callable[[str], bool]) -> str:
    """Why a record cannot be used, or nothing."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        return f"wanted an object with a list 'conversations', got {_kind(row)}"
    said = row["conversations"]
    if not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in said
    ):
        return "every turn is {'from': 'human' or 'gpt', 'value': text}"
    return _wrong_roles(said) or _wrong_picture(row, said, is_picture)


def _wrong_roles(said: list[dict[str, str]]) -> str:
    roles = [turn["from"] for turn in said]
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        return f"a turn is from {unknown[0]!r}; wanted 'human' or 'gpt'"
    if not said or roles == ["human"]:
        return "a conversation without an answer; wanted a 'gpt' turn after each 'human' turn"
    for place, role in enumerate(roles):
        if role != ("human", "gpt")[place % 2]:
            return f"roles out of order: turn {place} is from {role!r}; 'human' and 'gpt' take turns"
    if len(roles) % 2:
        return "a conversation without an answer to its last question; remove that question"
    empty = [place for place, turn in enumerate(said) if turn["from"] == "gpt" and not turn["value"].strip()]
    return f"the answer in turn {empty[0]} is empty" if empty else ""


def _wrong_picture(row: dict[str, Any], said: list[dict[str, str]], is_picture: Callable[[str], bool]) -> str:
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        return f"'image' is {_kind(image)}; wanted the name of one file"
    marks = [turn["value"].count(IMAGE) for turn in said]
    wanted = 0 if image is None else 1
    if sum(marks) != wanted:
        return f"holds {sum(marks)} marks {IMAGE} for {wanted} pictures; wanted {wanted}"
    if image is not None and not marks[0]:
        return f"the mark {IMAGE} is in turn {marks.index(1)}; wanted it in the first"
    if image is not None and not is_picture(image):
        return f"there is no picture {image!r}"
    return ""


def _kind(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ([], {}) else f"a {type(value).__name__}"

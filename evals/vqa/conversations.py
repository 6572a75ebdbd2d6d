"""LLaVA's training conversations: read, checked before training starts, and split by what is learned.

A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`; `<image>` in
the first question marks the image's position. Text-only records have neither. A file is one
JSON list or has one record per line. As in LLaVA's own loader, an answer before the first question is
dropped; unusable records are dropped too, counted, and accepted up to a share of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from radio.errors import DataError, shown
from radio.io import validate

from .prompts import IMAGE, PLAIN, VICUNA_V1, ask
from .scoring.records import read_list

Template = Literal["plain", "v1"]


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Record(NamedTuple):
    """A conversation, with or without an image; `<image>` is removed from the questions."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


class Piece(NamedTuple):
    """A part of the text that the language model sees, and whether the loss covers it."""

    text: str
    learned: bool


class Reading(NamedTuple):
    """The usable records of a file of conversations, and notes on the others."""

    records: list[Record]
    notes: tuple[str, ...]  # what was left out


_Said = TypedDict("_Said", {"from": str, "value": str})


class _Row(TypedDict):
    """A record as in the file."""

    id: NotRequired[int | str | None]
    image: NotRequired[str | None]
    conversations: list[_Said]


_ROW = TypeAdapter(_Row)


def read_records(
    path: Path, is_image: Callable[[str], bool], limit: int | None = None, max_error_fraction: float = 0.01
) -> Reading:
    """Read and check the conversations in a file.

    Args:
        path: one JSON list of records, or one record per line.
        is_image: whether an image of that name exists.
        limit: use this many records, evenly spread.
        max_error_fraction: drop unusable records, up to this share of them.

    Raises:
        DataError: no such file, not such a list, or too many unusable records; names the first and
            the number of the others.
    """
    rows = read_list(path)
    if not rows:
        raise DataError(f"{shown(path)}: wanted a list of LLaVA records with one or more, got an empty list")
    if limit is not None and limit < len(rows):
        rows = [rows[place * len(rows) // limit] for place in range(limit)]
    records: list[Record] = []
    wrong: list[str] = []
    early: list[str] = []
    for number, (where, row) in enumerate(rows):
        label = f"{where} (id {_id(row)})"
        try:
            record, begins_early = _record(row, str(number), is_image)
        except DataError as error:
            wrong.append(f"{label}: {error}")
            continue
        records.append(record)
        if begins_early:
            early.append(label)
    if len(wrong) > max_error_fraction * len(rows):
        more = f"; {len(wrong) - 1} more records cannot be used" if len(wrong) > 1 else ""
        hint = f" (up to --max-error-fraction {max_error_fraction:g} of the records may be left out)"
        raise DataError(f"{shown(path)}: {wrong[0]}{hint}{more}")
    return Reading(records, tuple(_notes(path, len(rows), wrong, early)))


def _notes(path: Path, count: int, wrong: list[str], early: list[str]) -> Iterator[str]:
    if wrong:
        yield (
            f"{len(wrong)} of the {count} records of {path.name} cannot be used and were left out; the first "
            f"is {wrong[0]}"
        )
    if early:
        yield (
            f"{len(early)} of the {count} conversations of {path.name} begin with an answer, which was left "
            f"out as LLaVA does; the first is {early[0]}"
        )


def fingerprint(records: Iterable[Record]) -> str:
    """Compute a hash of the training records, with images by name."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(json.dumps(record, ensure_ascii=False).encode())
    return sha.hexdigest()


def pieces(record: Record, template: Template, end: str) -> list[Piece]:
    """Split a record's text into learned and other pieces; `end` is the language model's end of text.

    `plain` is the image and its caption only; `v1` is Vicuna's chat.
    """
    has_image = record.image is not None
    if template == "plain":
        caption = record.turns[0].answer + PLAIN.separators[1]
        return [Piece(ask(PLAIN, "", has_image), False), Piece(caption, True)]
    found: list[Piece] = []
    for number, turn in enumerate(record.turns):
        asked = ask(VICUNA_V1, turn.question, has_image and number == 0)
        if number:  # the system text comes once
            asked = asked.removeprefix(VICUNA_V1.system + VICUNA_V1.separators[0])
        # the space belongs to the answer: many tokenizers merge it with the following word
        found += [Piece(asked, False), Piece(f" {turn.answer}{end}", True)]
    return found


def _record(row: Any, number: str, is_image: Callable[[str], bool]) -> tuple[Record, bool]:
    """Check a record; return it, and whether it begins with an answer, which is dropped.

    Raises:
        DataError: it cannot be used; the message gives the reason, not the place.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DataError(f"wanted an object with a list 'conversations', got {_kind(row)}")
    found = validate(_ROW, row, "a record is {'id', 'image', 'conversations': [{'from', 'value'}]}")
    said = found["conversations"]
    begins_early = len(said) > 1 and said[0]["from"] == "gpt"
    said = said[begins_early:]
    _check_roles([turn["from"] for turn in said])
    values = [turn["value"] for turn in said]
    empty = next((place for place in range(1, len(said), 2) if not values[place].strip()), None)
    if empty is not None:
        raise DataError(f"the answer in turn {empty} is empty")
    image = found.get("image")
    _check_image(image, values, is_image)
    turns = tuple(
        Turn(question.replace(IMAGE, "").strip(), answer.strip())
        for question, answer in zip(values[::2], values[1::2], strict=True)
    )
    name = found.get("id")
    return Record(number if name is None else str(name), image, turns), begins_early


def _check_roles(roles: list[str]) -> None:
    unknown = [role for role in roles if role not in ("human", "gpt")]
    if unknown:
        raise DataError(f"a turn is from {unknown[0][:40]!r}; wanted 'human' or 'gpt'")
    if not roles or roles == ["human"]:
        raise DataError("a conversation without an answer; wanted a 'gpt' turn after each 'human' turn")
    for place, role in enumerate(roles):
        if role != ("human", "gpt")[place % 2]:
            raise DataError(
                f"roles out of order: turn {place} is from {role!r}; 'human' and 'gpt' take turns"
            )
    if len(roles) % 2:
        raise DataError("a conversation without an answer to its last question; remove that question")


def _check_image(image: str | None, values: list[str], is_image: Callable[[str], bool]) -> None:
    marks = [value.count(IMAGE) for value in values]
    wanted = 0 if image is None else 1
    if sum(marks) != wanted:
        raise DataError(f"holds {sum(marks)} marks {IMAGE} for {wanted} images; wanted {wanted}")
    if image is not None and not marks[0]:
        raise DataError(f"the mark {IMAGE} is in turn {marks.index(1)}; wanted it in the first")
    if image is not None and not is_image(image):
        raise DataError(f"there is no image {image[:200]!r}")


def _kind(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ([], {}) else f"a {type(value).__name__}"


def _id(row: Any) -> str:
    name = row.get("id") if isinstance(row, dict) else None
    return shown(str(name)[:80]) if isinstance(name, str | int | None) else _kind(name)

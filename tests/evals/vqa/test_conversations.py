"""LLaVA's records: what is read, what is refused, and which part of the text is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.data import Piece, Record, Turn, fingerprint, pieces, read_records
from radio.errors import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Row = Callable[..., dict[str, Any]]
Save = Callable[[Any], Path]


def there(name: str) -> bool:
    return name == "a.png"


def test_records_are_read_with_and_without_a_image(make_row: Row, write_json: Save) -> None:
    path = write_json(
        [
            make_row("1", "a.png", "<image>\nWhat?", "A cat.", "Where?", " Here. "),
            make_row("2", "a.png", "Which colour?\n<image>", "red"),
            make_row("3", None, "Hello?", "Hi."),
        ]
    )
    assert read_records(path, there).records == [
        Record("1", "a.png", (Turn("What?", "A cat."), Turn("Where?", "Here."))),
        Record("2", "a.png", (Turn("Which colour?", "red"),)),
        Record("3", None, (Turn("Hello?", "Hi."),)),
    ]
    assert [record.id for record in read_records(path, there, limit=2).records] == ["1", "2"]


@pytest.mark.parametrize(
    ("turns", "image", "message"),
    [
        (("<image>\nWhat?", "A cat."), "b.png", r"there is no image 'b.png'"),
        (("<image>\nWhat?",), "a.png", r"a conversation without an answer; wanted a 'gpt' turn"),
        ((), "a.png", r"a conversation without an answer"),
        (("<image>\nWhat?", "A", "And?"), "a.png", r"without an answer to its last question"),
        (("What?", "A cat."), "a.png", r"holds 0 marks <image> for 1 images; wanted 1"),
        (("<image><image>\nWhat?", "A"), "a.png", r"holds 2 marks <image> for 1 images"),
        (("<image>\nWhat?", "A"), None, r"holds 1 marks <image> for 0 images; wanted 0"),
        (("What?", "A", "<image>?", "B"), "a.png", r"the mark <image> is in turn 2; wanted it in the first"),
        (("<image>\nWhat?", " "), "a.png", r"the answer in turn 1 is empty"),
    ],
)
def test_what_cannot_be_used_is_named(
    make_row: Row, write_json: Save, turns: tuple[str, ...], image: str | None, message: str
) -> None:
    good = make_row("1", "a.png", "<image>\nWhat?", "A cat.")
    path = write_json([good, make_row("2", image, *turns), make_row("3", image, *turns)])
    with pytest.raises(DataError, match=message) as error:
        read_records(path, there)
    assert str(error.value).startswith(f"{path}: record 1 (id 2): ")
    assert str(error.value).endswith("; 1 more records cannot be used")


def test_roles_out_of_order(make_row: Row, write_json: Save) -> None:
    bad = make_row("7", None, "What?", "A")
    bad["conversations"] = [bad["conversations"][place] for place in (0, 1, 1)]
    with pytest.raises(DataError, match=r"record 0 \(id 7\): roles out of order: turn 2 is from 'gpt'"):
        read_records(write_json([bad]), there)
    bad["conversations"][0]["from"] = "system"
    with pytest.raises(DataError, match=r"a turn is from 'system'; wanted 'human' or 'gpt'"):
        read_records(write_json([bad]), there)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, r"line 1 \(id None\): wanted an object with a list 'conversations', got an empty dict"),
        ([], "got an empty list"),
        ([3], r"record 0 \(id None\): wanted an object with a list 'conversations', got a int"),
        (
            [{"conversations": [{"from": "human"}]}],
            r"'conversations': \[{'from', 'value'}\]}: conversations\[0\].value: field required",
        ),
        (
            [
                {
                    "image": 3,
                    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
                }
            ],
            "image: input should be a valid string, got 3",
        ),
    ],
)
def test_other_json_is_refused(write_json: Save, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(write_json(rows), there)


def test_one_record_a_line_and_what_others_write(make_row: Row, tmp_path: Path) -> None:
    rows = [
        make_row("1", "a.png", "<image>\nWhat?", "A cat."),
        make_row("2", None, "Où?", "Là\u2028bas \ud83d"),
    ]
    rows[0]["id"] = 1  # a number
    rows[1]["id"] = None
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    wanted = [
        Record("1", "a.png", (Turn("What?", "A cat."),)),
        Record("1", None, (Turn("Où?", "Là\u2028bas \ufffd"),)),  # half an emoji
    ]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "data.jsonl").write_text(lines, encoding=encoding)
        assert read_records(tmp_path / "data.jsonl", there).records == wanted
    fingerprint(wanted)


def test_an_answer_before_the_first_question_is_left_out(make_row: Row, write_json: Save) -> None:
    early = make_row("2", "a.png", "<image>\nWhat?", "A cat.")
    early["conversations"].insert(0, {"from": "gpt", "value": "I am ready."})
    good = make_row("1", None, "Hello?", "Hi.")
    path = write_json([good, early])
    records, notes = read_records(path, there)
    assert records == [
        Record("1", None, (Turn("Hello?", "Hi."),)),
        Record("2", "a.png", (Turn("What?", "A cat."),)),
    ]
    (note,) = notes
    assert note == (
        "1 of the 2 conversations of data.json begin with an answer, which was left out as LLaVA does; "
        "the first is record 1 (id 2)"
    )


def test_a_few_records_that_cannot_be_used_are_left_out(make_row: Row, write_json: Save) -> None:
    rows = [make_row(f"{n}", None, "Hello?", "Hi.") for n in range(99)]
    path = write_json([*rows[:50], make_row("empty", None, "Hello?", " "), *rows[50:]])
    records, notes = read_records(path, there)
    assert [record.id for record in records] == [f"{n}" for n in range(99)]
    (note,) = notes
    assert note == (
        "1 of the 100 records of data.json cannot be used and were left out; the first is record 50 "
        "(id empty): the answer in turn 1 is empty"
    )
    with pytest.raises(DataError, match=r"record 50 \(id empty\): the answer in turn 1 is empty"):
        read_records(path, there, max_error_fraction=0.009)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "absent.json", there)
    (tmp_path / "part.json").write_text('[{"id"')
    with pytest.raises(DataError, match="is not JSON"):
        read_records(tmp_path / "part.json", there)


def test_plain_learns_the_caption_and_v1_the_answers() -> None:
    caption = Record("1", "a.png", (Turn("", "a red cat"),))
    assert pieces(caption, "plain", "</s>") == [Piece("<image>", False), Piece("a red cat\n", True)]
    record = Record("1", "a.png", (Turn("What?", "Cat."), Turn("Where?", "Here.")))
    assert pieces(record, "v1", "</s>") == [
        Piece(f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", False),
        Piece(" Cat.</s>", True),
        Piece("USER: Where? ASSISTANT:", False),
        Piece(" Here.</s>", True),
    ]
    assert pieces(record._replace(image=None), "v1", "</s>")[0].text == f"{SYSTEM} USER: What? ASSISTANT:"


def test_the_fingerprint_is_of_all_that_is_said() -> None:
    record = Record("1", "a.png", (Turn("What?", "Cat."),))
    assert fingerprint([record]) == fingerprint([record])
    changed = [record._replace(image=None), record._replace(turns=(Turn("What?", "Dog."),))]
    assert len({fingerprint([one]) for one in [record, *changed]}) == 3

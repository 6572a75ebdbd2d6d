"""Broken things are listed once, and endured up to a share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radio.errors import DataError
from train.data import faults as module
from train.data.faults import Fault, FaultList, check_share, in_words

ONE, TWO = Fault("missing", "a.tar", "no such shard"), Fault("picture", "b.tar/0.jpg", "not a picture")


def test_each_thing_is_listed_once_even_by_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    listing = FaultList(path)
    listing.add([])
    assert not path.exists()
    listing.add([ONE, ONE])
    listing.add([ONE])
    with path.open("a") as file:
        file.write('{"cause": "miss')  # a line that was being written
    again = FaultList(path)
    again.add([ONE, TWO])
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [ONE._asdict(), TWO._asdict()]


def test_the_list_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LISTED", 3)
    listing = FaultList(tmp_path / "broken.jsonl")
    for number in range(4):
        listing.add([Fault("picture", f"{number}{k}", "") for k in range(2)])
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("broken", "seen", "fine"), [(10, 10, True), (11, 12, False), (11, 1100, True)])
def test_a_share_is_let_through(broken: int, seen: int, fine: bool) -> None:
    if fine:
        check_share(broken, seen, 0.01)
        return
    with pytest.raises(DataError, match=f"{broken} of {seen} shards cannot be read; mend the data"):
        check_share(broken, seen, 0.01, "shards")


def test_counts_in_words() -> None:
    assert in_words({"missing": 1, "picture": 12}) == "12 pictures that cannot be decoded, 1 missing shards"
    assert in_words({"missing": 0}) == ""

"""Broken things are listed once, and endured up to a share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as effort

from radio.dist import Ranks
from radio.errors import DataError
from train.data import errors as module
from train.data.errors import ErrorList, ErrorMonitor, ReadError, check_fraction

ONE, TWO = ReadError("missing", "a.tar", "no such shard"), ReadError("image", "b.tar/0.jpg", "not an image")


def test_each_thing_is_listed_once_even_by_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    told: list[str] = []
    listing = ErrorList(path, told.append)
    listing.add([])
    assert not path.exists()
    listing.add([ONE, ONE])
    listing.add([ONE])
    with path.open("a") as file:
        file.write('{"cause": "miss')  # a line that was being written
    again = ErrorList(path, told.append)
    again.add([ONE, TWO])
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [ONE._asdict(), TWO._asdict()]
    (line,) = told
    assert line.startswith(f"{path}: 1 of 2 lines are no records of broken data (line 2: is not JSON (Unter")
    assert line.endswith("; they are left out, and the file as it was is now broken.jsonl.damaged")


def test_the_list_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LINES", 3)
    listing = ErrorList(tmp_path / "broken.jsonl", print)
    for number in range(4):
        listing.add([ReadError("image", f"{number}{k}", "") for k in range(2)])
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 3


GOOD = json.dumps(ONE._asdict()).encode()
DEEP = b"[" * 100_000
BAD_LINES = {
    "nested": DEEP,
    "object nested": b'{"cause": ' * 100_000,
    "long number": b"9" * 5000,
    "nan": b"NaN",
    "infinity": b"-Infinity",
    "beyond floats": b"1e999",
    "list": b"[1, 2]",
    "text": b'"missing"',
    "number": b"1",
    "null": b"null",
    "empty object": b"{}",
    "another cause": b'{"cause": "bad luck", "where": "a", "why": ""}',
    "not text": b'{"cause": "missing", "where": 1, "why": ""}',
    "cut off": GOOD[:20],
    "after a key": b'{"cause":',
    "not UTF-8": b'{"cause": "missing", "where": "\xff", "why": "}',
    "nul": b"\0",
    "empty": b"",
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("place", [0, 1])
def test_records_among_other_lines_are_kept(tmp_path: Path, bad: bytes, place: int) -> None:
    path = tmp_path / "broken.jsonl"
    lines = [GOOD, json.dumps(TWO._asdict()).encode()]
    lines.insert(place, bad)
    before = b"\n".join(lines) + b"\n"
    path.write_bytes(before)
    told: list[str] = []
    ErrorList(path, told.append).add([ONE, TWO, ReadError("empty", "c.tar", "holds no images")])
    wheres = [json.loads(line)["where"] for line in path.read_text().splitlines()]
    assert wheres == ["a.tar", "b.tar/0.jpg", "c.tar"]
    assert len(told) == 1
    assert f"broken.jsonl: 1 of 3 lines are no records of broken data (line {place + 1}:" in told[0]
    assert (tmp_path / "broken.jsonl.damaged").read_bytes() == before


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_list_that_an_editor_has_saved_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(f"{GOOD.decode()}\r\n".encode(encoding))
    ErrorList(path, lambda line: pytest.fail(line)).add([ONE])
    assert path.read_bytes() == GOOD + b"\n"


def test_a_last_line_without_an_end_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(GOOD)
    ErrorList(path, lambda line: pytest.fail(line)).add([ONE, TWO])
    assert len(path.read_text().splitlines()) == 2


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("folder", "a folder"), ("pipe", "no regular file")):
        with pytest.raises(DataError, match=f"{name}: is {kind}; give a file"):
            ErrorList(tmp_path / name, print)


def test_names_that_are_not_utf_8_are_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    fault = ReadError("image", "a.tar/caf\udce9\n.jpg", "\x1b[2J")
    for _ in range(2):
        ErrorList(path, lambda line: pytest.fail(line)).add([fault])
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [
        {"cause": "image", "where": "a.tar/caf\\udce9\\n.jpg", "why": "\\x1b[2J"}
    ]


def test_a_full_disk_delays_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.jsonl"
    told: list[str] = []
    listing = ErrorList(path, told.append)
    listing.add([ONE])
    full = Path("/dev/full")
    assert full.exists(), "the test needs Linux"
    monkeypatch.setattr(listing, "_path", full)
    listing.add([TWO])
    listing.add([ReadError("empty", "c.tar", "")])
    assert told == ["/dev/full: No space left on device; its new lines wait for the next time"]
    monkeypatch.setattr(listing, "_path", path)
    listing.add([])
    assert [json.loads(line)["where"] for line in path.read_text().splitlines()] == [
        "a.tar",
        "b.tar/0.jpg",
        "c.tar",
    ]


def test_what_is_left_out_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    listing = ErrorList(tmp_path / "broken.jsonl", told.append)
    for name in "ab":
        listing.add([ReadError("left out", f"{name}.tar", "1 members are links")])
    assert told == ["a.tar: 1 members are links; broken.jsonl names all such shards"]


@effort(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=strategies.lists(
        strategies.one_of(
            strategies.sampled_from([GOOD, b"\xef\xbb\xbf", b"\xff\xfe", *BAD_LINES.values()]),
            strategies.binary(max_size=30),
            strategies.recursive(
                strategies.none() | strategies.floats() | strategies.integers() | strategies.text(),
                lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
                max_leaves=5,
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=6,
    )
)
def test_any_list_is_taken_up_or_told(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(lines))
    told: list[str] = []
    ErrorList(path, told.append).add([TWO])
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept[-1] == TWO._asdict()
    assert all(entry.keys() == TWO._asdict().keys() for entry in kept)
    assert len(told) <= 1


@pytest.mark.parametrize(("broken", "seen", "fine"), [(10, 10, True), (11, 12, False), (11, 1100, True)])
def test_a_share_is_let_through(broken: int, seen: int, fine: bool) -> None:
    if fine:
        check_fraction(broken, seen, 0.01)
        return
    with pytest.raises(DataError, match=f"{broken} of {seen} shards cannot be read; mend the data"):
        check_fraction(broken, seen, 0.01, "shards")


def test_counts_in_words(tmp_path: Path) -> None:
    monitor = ErrorMonitor(tmp_path, Ranks(), print)
    assert monitor.describe() == ""
    monitor.add(1, [ONE, *[TWO] * 12])
    monitor.check(1000, 0.1)
    assert monitor.describe() == "12 images that cannot be decoded, 1 missing shards"


def test_a_list_that_is_gone_when_a_run_goes_on_is_told(tmp_path: Path) -> None:
    path, told = tmp_path / "broken.jsonl", list[str]()
    for count in (0, 3):
        ErrorList(path, told.append).check_names(count)
    ErrorList(path, told.append).add([ONE])
    ErrorList(path, told.append).check_names(3)
    assert told == [f"{path}: names none of the 3 broken data met before, and begins anew"]

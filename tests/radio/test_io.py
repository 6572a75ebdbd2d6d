"""The border that every file from outside passes, and folders that appear whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import braceexpand
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from radio import io
from radio.errors import CheckpointError, ConfigError, DataError
from radio.io import (
    expand_braces,
    lines_of,
    make_folder,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_text,
    write_text,
)


class Record(TypedDict):
    id: int
    names: list[str]


RECORD = TypeAdapter(Record)
RECORDS = TypeAdapter(list[Record])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_read_with_or_without_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps([{"id": 1, "names": ["é\u2028"]}], ensure_ascii=False).encode(encoding))
    assert read_json(path, RECORDS) == [{"id": 1, "names": ["é\u2028"]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.json: is not JSON \(Expecting value: line 1 column 1\)"),
        (b"[" * 100_000, r"x\.json: is nested too deeply"),
        (b'[{"id": ' + b"9" * 5000 + b"}]", r"x\.json: is not JSON \(Exceeds the limit"),
        (b"[NaN]", r"x\.json: is not JSON \(it holds NaN"),
        (b'"\xff"', r"x\.json: is not UTF-8 text \(byte 1: 0xff\)"),
        (b"{}", r"x\.json: input should be a valid list, got a dict of 0"),
        (
            b'[{"id": 1, "names": []}, {"id": "7"}]',
            r"x\.json: \[1\]\.id: .*valid integer, got '7' \(and 1 more\)",
        ),
        (b'[{"id": true, "names": []}]', r"\[0\]\.id: input should be a valid integer, got True"),
    ],
)
def test_what_does_not_fit_is_one_error_with_file_and_place(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_json(path, RECORDS)
    assert "\n" not in str(caught.value)


def test_only_regular_files_within_the_limit_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"12345")
    for path, message in (
        (tmp_path, "is a folder; give a file"),
        (tmp_path / "pipe", "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "absent", "no such file"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / "big" / "x", "Not a directory"),
        (tmp_path / "nul\0", "cannot be a path"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_bytes(path, error=CheckpointError)
    with pytest.raises(DataError, match="has 5 bytes, and the limit is 4"):
        read_bytes(tmp_path / "big", limit=4)
    assert read_bytes(tmp_path / "big", limit=5) == b"12345"


def test_half_surrogates_are_replaced_whole_ones_and_everything_else_kept(tmp_path):
    assert parse_json(r'{"\ud83d": ["a\ude00b", "\ud83d\ude00"]}', "x") == {
        "\ufffd": ["a\ufffdb", "\U0001f600"]
    }
    write_text(tmp_path / "x", "a\ud83db é")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "a\ufffdb é"


def test_lines_end_at_line_feeds_alone(tmp_path):
    assert lines_of("a\u2028b\r\nc\x0bd\n\ne\x85") == ["a\u2028b", "c\x0bd", "", "e\x85"]
    assert lines_of("") == []
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "names": ["a\u2028b"]}\n\n{"id": 2, "names": []}', encoding="utf-8")
    assert [(n, r["id"]) for n, r in read_jsonl(path, RECORD)] == [(1, 1), (3, 2)]
    path.write_text('{"id": 1, "names": []}\n{"id": 2', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl: line 2: is not JSON"):
        list(read_jsonl(path, RECORD))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda c: st.lists(c) | st.dictionaries(st.text(), c),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b'[{"id":1e999,"names":[]}]')
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for read in (
        lambda: read_json(path, RECORDS),
        lambda: list(read_jsonl(path, RECORD)),
        lambda: read_text(path),
    ):
        with contextlib.suppress(DataError):
            read()


def test_a_folder_appears_whole_or_not_at_all_and_who_comes_second_takes_what_stands(tmp_path):
    target = tmp_path / "new" / "world"

    def fill(folder: Path) -> None:
        (folder / "a").write_text("ours")

    def fill_too_late(folder: Path) -> None:
        assert make_folder(target, fill)
        (folder / "a").write_text("theirs")

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        make_folder(target, fail)
    assert list(target.parent.iterdir()) == []
    assert not make_folder(target, fill_too_late)
    assert (target / "a").read_text() == "ours"
    assert list(target.parent.iterdir()) == [target]


def test_nothing_is_converted(tmp_path):
    values: list[Any] = [{"id": 1.0, "names": []}, {"id": 1, "names": [1]}]
    for value in values:
        (tmp_path / "x.json").write_text(json.dumps(value))
        with pytest.raises(DataError):
            read_json(tmp_path / "x.json", RECORD)


@given(st.text(alphabet="{},.019az\\-", max_size=14))
@example("p-{000..012}-{a..c}.tar")
@example("{{0..3},{a..c..2},x}{1,}")
@example("{0..9\n}")
def test_braces_are_counted_before_they_are_spelled_out(pattern):
    try:
        wanted = list(itertools.islice(braceexpand.braceexpand(pattern), 1000))
    except ValueError:
        wanted = None
    try:
        names = expand_braces(pattern, limit=999)
    except DataError as error:
        names, said = None, str(error)
    if names is None:
        assert wanted is None or len(wanted) == 1000 or "unbalanced" in said
    else:
        assert names == wanted
        assert io._count_names(pattern) == len(names)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("p-{0..999999999}.tar", "stands for 1,000,000,000 names, and the limit is 2,000,000"),
        ("{a..z}" * 20, r"stands for 10\^28 or more names"),
        ("{{a,b}" + "{a,b}" * 40 + ",c}", "stands for 2,199,023,255,553 names"),
        ("{0..9999999999999999999999999}", "names, and the limit"),
        ("p-{0..1.tar", "unbalanced braces; wanted a pattern such as"),
        ("{" * 2000 + "a,b" + "}" * 2000, "nested more than 50 deep"),
        ("x" * 5000, "has 5000 letters"),
        ("x" * 600 + "{0..999999}", r"1,000,000 names of up to 611 letters, and the limit is 536,870,912"),
    ],
)
def test_patterns_that_nobody_can_mean_are_refused_at_once(pattern, message):
    with pytest.raises(DataError, match=message):
        expand_braces(pattern)


def test_what_a_killed_process_left_is_removed_and_what_one_fills_is_not(tmp_path: Path) -> None:
    stray, fresh, foreign = (tmp_path / name for name in (".out.partial-a", ".out.partial-b", ".x.partial-c"))
    for folder in (stray, fresh, foreign):
        folder.mkdir()
        (folder / "half").write_text("")
    for folder in (stray, foreign):
        os.utime(folder, (1e9, 1e9))

    def fill(folder: Path) -> None:
        os.utime(folder, (1e9, 1e9))  # old, but somebody is at it
        assert make_folder(tmp_path / "out", lambda other: (other / "whole").write_text("")) is True
        assert folder.is_dir()

    assert make_folder(tmp_path / "out", fill) is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-b", ".x.partial-c", "out"]


def test_no_device_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to(os.devnull)  # the check looks through links; as root a rename would succeed
    with pytest.raises(ConfigError, match="null: is a device, which no file may replace; name a file"):
        write_text(link, "x")
    assert link.is_symlink() and Path(os.devnull).is_char_device()


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]'])
def test_a_key_twice_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="it holds the key 'a' twice in one object"):
        parse_json(text, "x.json")


def test_lines_that_end_in_an_error_leave_the_file_as_it_was(tmp_path: Path) -> None:
    def lines(fail: bool) -> Iterator[str]:
        yield "one\n"
        yield "two \ud800\n"
        if fail:
            raise ConfigError("no third line")

    io.write_lines(tmp_path / "a", lines(fail=False))
    with pytest.raises(ConfigError, match="no third line"):
        io.write_lines(tmp_path / "a", lines(fail=True))
    assert (tmp_path / "a").read_text(encoding="utf-8") == "one\ntwo \ufffd\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_for_a_library_has_a_utf8_name(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"))
    io.check_writable(folder, "--out")
    with pytest.raises(ConfigError, match=r"--cache .*x\\udcff: its name is not UTF-8"):
        io.check_writable(folder, "--cache", utf8=True)


def test_a_folder_that_a_full_disk_stops_is_named(tmp_path: Path) -> None:
    def fill(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*world"):
        make_folder(tmp_path / "world", fill)
    assert not list(tmp_path.iterdir())


def test_files_that_belong_together_move_in_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with io.staged(folder) as fresh:
            io.write_text(fresh / "maps" / "a.png", "second")
            raise OSError(28, "No space left on device", str(fresh / "maps" / "b.png"))

    out = tmp_path / "new" / "out"
    with io.staged(out) as fresh:
        io.write_text(fresh / "maps" / "a.png", "first")
        assert not out.exists()
    (out / "own").write_text("kept")
    (tmp_path / "out").symlink_to(out)
    with pytest.raises(OSError, match=r"No space left on device: '.*/new/out/maps/b\.png'"):
        fill(out)
    assert (out / "maps" / "a.png").read_text() == "first"
    with io.staged(tmp_path / "out") as fresh:
        io.write_text(fresh / "maps" / "a.png", "third")
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {
        "new/out/maps/a.png": "third",
        "new/out/own": "kept",
    }


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(value=_PLAIN, indent=st.none() | st.integers(0, 2))
@example(value={'": ': [{'":': 1, "b": '"\\":'}], "": {}}, indent=2)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_json_is_read_as_pythons_own_parser_reads_it(value, indent):
    for text in (json.dumps(value, indent=indent), json.dumps(value, ensure_ascii=False)):
        if io.has_surrogates(text) or io.without_surrogates(value) != value:
            continue
        found = parse_json(text, "x")
        assert found == json.loads(text) and json.dumps(found) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '[{"b": {"a" : 1, "c": "\\":", "a": 2}}]',
        '{"a\\u0062": 1, "ab": 2}',
    ],
)
def test_a_key_that_hides_another_is_found_by_the_quick_parser_too(text):
    with pytest.raises(DataError, match=r"holds the key 'ab?' twice in one object"):
        parse_json(text, "x")

"""A run's log keeps its records, whatever happened to the file between two runs."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio.errors import DataError, RadioError
from train.records import read_lines, read_records
from train.sinks import JsonLines

GOOD = '{"step": 2, "loss": 0.5, "skipped": 0, "not_finite": "clip/spatial", "mfu": null}'
BAD = (
    "[" * 100_000,
    '{"step": ' * 100_000,
    '{"step": 1' + "0" * 5000 + "}",
    '{"step": 1, "loss": NaN}',
    '{"step": 1, "loss": 1e999}',
    "Infinity",
    "[1, 2]",
    "[[1]]",
    '"\\ud800"',
    '"step"',
    "null",
    "7",
    "{}",
    '{"step": -1}',
    '{"step": 1.5}',
    '{"step": true}',
    '{"step": "1"}',
    '{"step": 1, "loss": [1]}',
    "\0\0\0",
    '{"step": 1, "los',
    '{"step": 1, "loss":',
)


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_whole_records_are_kept_and_the_rest_is_told_and_set_aside(tmp_path: Path, bad: str) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    text = f"{GOOD}\n{bad}\n{GOOD}\n"
    path.write_text(text)
    JsonLines(path, 5, said.append).close()
    assert path.read_text() == f"{GOOD}\n{GOOD}\n"
    (line,) = said
    assert "1 lines are no records, and left out" in line
    (aside,) = tmp_path.glob("metrics.damaged-*.jsonl")
    assert aside.read_text() == text
    assert str(aside) in line


def test_bytes_that_are_no_text_spoil_their_own_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"step": 3, "name": "caf\xe9"}\n' + GOOD.encode() + b"\n")
    assert [len(read_lines(path).records), read_lines(path).others] == [2, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_damage(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n", encoding=encoding)
    assert read_records(path) == [json.loads(GOOD)] * 2
    assert read_lines(path).others == 0


def test_a_line_that_a_kill_cut_off_goes_without_a_word(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_text(f'{GOOD}\n{{"step": 3, "lo')
    JsonLines(path, 5, said.append).close()
    assert (path.read_text(), said) == (f"{GOOD}\n", [])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl: is a folder"):
        JsonLines(tmp_path / "metrics.jsonl", 0, print)


class FullDisk:
    """A file that takes part of a record, then nothing, until there is room again."""

    def __init__(self, file: Any) -> None:
        self.file, self.full, self.calls = file, False, 0

    def write(self, data: memoryview) -> int:
        if not self.full:
            return int(self.file.write(data))
        self.calls += 1
        if self.calls % 2:
            return int(self.file.write(data[:5]))
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_on_a_full_disk_records_are_kept_until_there_is_room(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    log = JsonLines(path, 0, said.append)
    disk: Any = FullDisk(log._file)
    log._file = disk
    log.write({"step": 1})
    disk.full = True
    log.write({"step": 2})
    log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n'  # no half of a record
    assert said == [
        f"{path} could not be written (No space left on device); its records are kept until it can"
    ]
    disk.full = False
    log.write({"step": 4})
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4]
    disk.full = True
    log.write({"step": 5})
    with pytest.raises(RadioError, match=r"the last records could not be written \(No space left"):
        log.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just(GOOD.encode()), st.binary(max_size=40), st.sampled_from([b.encode() for b in BAD[2:]])
        )
    )
)
def test_any_bytes_leave_every_good_line(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        found = [line for line, _ in read_lines(path).records]
        bare = [part for line in lines for part in line.split(b"\n")]
        if bare and not bare[0].startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 says so in its first bytes
            assert found.count(GOOD) >= bare.count(GOOD.encode())
        JsonLines(path, 5, lambda line: None).close()
        assert read_lines(path).others == 0

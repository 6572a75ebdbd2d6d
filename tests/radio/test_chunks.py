from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from radio.chunks import (
    Damage,
    DamagedError,
    TensorSpec,
    check_all_there,
    chunk_path,
    find_missing,
    load_tensors,
    read_records,
    read_tensors,
    write_records,
    write_tensors,
)
from radio.errors import DataError

SPECS = {"rows": TensorSpec(torch.float16, (None, 3)), "ids": TensorSpec(torch.int64, (None,))}
ROWS = {"rows": torch.arange(12.0).half().reshape(4, 3), "ids": torch.tensor([1, 2, 5, 9])}
RECORDS = [(1, "a\u2028b", float("nan")), (2, "\ud800", 0.5)]
SCHEMA = TypeAdapter(tuple[int, str, float])


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = chunk_path(tmp_path / "key", 3)
    write_tensors(path, ROWS, {"left out": "[]"})
    return path


def test_what_was_written_is_read(entry: Path) -> None:
    found = read_tensors(entry, SPECS)
    assert all(torch.equal(found.tensors[name], ROWS[name]) for name in ROWS)
    assert found.metadata == {"left out": "[]"}
    assert torch.equal(load_tensors(entry, ["ids"]).tensors["ids"], ROWS["ids"])


def test_an_empty_entry_and_a_single_number_are_entries_too(tmp_path: Path) -> None:
    tensors = {"none": torch.empty(0, 0), "one": torch.tensor(2.5, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "k" / "x", tensors)
    specs = {"none": TensorSpec(torch.float32, (None, None)), "one": TensorSpec(torch.bfloat16, ())}
    assert read_tensors(tmp_path / "k" / "x", specs).tensors["one"] == 2.5


def test_records_are_read_as_they_were(tmp_path: Path) -> None:
    write_records(tmp_path / "k" / "x.jsonl", RECORDS)
    found = read_records(tmp_path / "k" / "x.jsonl", SCHEMA)
    assert json.dumps(found) == json.dumps(RECORDS)  # NaN is not equal to itself
    write_records(tmp_path / "k" / "none.jsonl", [])
    assert read_records(tmp_path / "k" / "none.jsonl", SCHEMA) == []


def _altered_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _of_another_place(path: Path) -> None:
    other = chunk_path(path.parent, 4)
    write_tensors(other, ROWS, {"left out": "[]"})
    shutil.copy(other, path)


def _other_metadata(path: Path) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(ROWS, path, metadata={**metadata, "left out": '[["x", "y"]]'})


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "altered": _altered_bytes,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"rows": 1})),
    "nested": lambda path: path.write_bytes(b"[" * 100_000),
    "giant header": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "other keys": lambda path: write_tensors(path, {"others": ROWS["rows"]}),
    "one more": lambda path: write_tensors(path, {**ROWS, "more": torch.ones(2)}),
    "another type": lambda path: write_tensors(path, {**ROWS, "rows": ROWS["rows"].float()}),
    "another shape": lambda path: write_tensors(path, {**ROWS, "rows": ROWS["rows"].T}),
    "no checksum": lambda path: safetensors.torch.save_file(ROWS, path),
    "other metadata": _other_metadata,
    "of another place": _of_another_place,
    "a folder": _a_folder,
    "a pipe": _a_pipe,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_missing_is_told_and_can_be_made_again(entry: Path, damage: str) -> None:
    whole, absent = chunk_path(entry.parent, 1), chunk_path(entry.parent, 2)
    write_tensors(whole, ROWS)
    DAMAGES[damage](entry)
    told = Damage()
    paths = [whole, absent, entry]
    assert find_missing(paths, lambda path: read_tensors(path, SPECS), told) == [1, 2]
    (note,) = told.notes()
    assert note.startswith("1 damaged file of the cache was made again; the first: ")
    assert str(entry) in note
    write_tensors(entry, ROWS)
    assert torch.equal(read_tensors(entry, SPECS).tensors["ids"], ROWS["ids"])


def test_nothing_is_said_where_all_is_whole(entry: Path) -> None:
    told = Damage()
    assert find_missing([entry], lambda path: read_tensors(path, SPECS), told) == []
    assert told.notes() == ()


def test_what_a_killed_run_left_is_removed_after_a_day(entry: Path) -> None:
    old, new, other = (entry.parent / name for name in (".3.safetensors.0badf00d", ".4.x.0badf00d", ".notes"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    find_missing([entry], lambda path: read_tensors(path, SPECS), Damage())
    assert sorted(path.name for path in entry.parent.iterdir()) == [new.name, other.name, entry.name]


def test_a_folder_that_ranks_do_not_share_is_an_error(entry: Path) -> None:
    check_all_there([entry])
    with pytest.raises(DataError, match="a folder that all share"):
        check_all_there([entry, chunk_path(entry.parent, 7)])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_byte_of_an_entry_can_change_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("entry")
    tensors, records = folder / "a.safetensors", folder / "b.jsonl"
    write_tensors(tensors, ROWS, {"x": "y"})
    write_records(records, RECORDS)
    path, read = data.draw(
        st.sampled_from(
            [(tensors, lambda p: read_tensors(p, SPECS)), (records, lambda p: read_records(p, SCHEMA))]
        )
    )
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    changed = content[:start] + data.draw(st.binary(max_size=12)) + content[end:]
    path.write_bytes(changed)
    with suppress(DamagedError):
        read(path)
        assert changed == content or path == tensors  # a header may be written with other spaces
        if path == tensors:
            found = read_tensors(path, SPECS).tensors
            assert all(torch.equal(found[name], ROWS[name]) for name in ROWS)

"""What a run has gone through is the same for any ranks, is plain data, and is checked against a share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as effort

from radio.dist import Group
from radio.errors import CheckpointError, DataError
from train.config import DataConfig
from train.data.faults import ReadError
from train.data.lanes import PLACE
from train.data.progress import LISTING, Progress, start_progress
from train.data.sources import open_sources
from train.data.stream import Mark, fewer_workers
from train.partition import make_partition

from .conftest import SIDE, follow, settings


def begin(data: DataConfig, folder: Path, world: int = 1, rank: int = 0, **options: int) -> Progress:
    config = replace(settings(data, 8, **options), out=folder)
    return start_progress(config, make_partition(config, world), Group(rank), open_sources(data), print)


def marks(cursor: int, *faults: ReadError, shards: int = 0) -> list[Mark]:
    return [Mark(torch.full((8, 1, PLACE), cursor), shards, faults)]


def test_a_state_goes_through_json_and_back(shards: str, tmp_path: Path) -> None:
    data = DataConfig(shards=(shards,))
    config = settings(data, 8, others=4)
    progress = begin(data, tmp_path, others=4)
    for step in follow(config, range(5)):
        progress.add([rows.mark for rows in step])
    state = json.loads(json.dumps(progress.state()))
    again = begin(data, tmp_path, others=4)
    again.restore(state)
    assert again.state() == state
    shares = again.shares([SIDE, SIDE])
    assert [len(share.lanes) for share in shares] == [8, 4]
    rest = list(follow(config, range(5, 9), cursors=[share.cursors for share in shares]))
    assert [[rows.keys for rows in step] for step in rest] == [
        [rows.keys for rows in step] for step in list(follow(config, range(9)))[5:]
    ]


def test_ranks_take_their_parts_of_a_state(shards: str, tmp_path: Path) -> None:
    data = DataConfig(shards=(shards,))
    progress = begin(data, tmp_path)
    cursors = torch.arange(8 * PLACE).reshape(8, 1, PLACE)
    progress.add([Mark(cursors, 7, (ReadError("missing", "a", ""),))])
    state = progress.state()
    parts = [begin(data, tmp_path, world=2, rank=rank) for rank in range(2)]
    for part in parts:
        part.restore(state)
    shares = [part.shares([SIDE])[0] for part in parts]
    assert torch.equal(torch.cat([share.cursors for share in shares]), cursors)
    assert [share.lanes for share in shares] == [range(4), range(4, 8)]
    counts = [part.state()["counts"] for part in parts]  # each alone here, and so of its own
    assert counts == [[0, 1, 0, 0, 0, 7], [0] * 6]


def test_a_state_of_other_lanes_is_refused(shards: str, tmp_path: Path) -> None:
    state = begin(DataConfig(shards=(shards,)), tmp_path).state()
    other = begin(DataConfig(shards=(shards,), num_streams=4), tmp_path)
    with pytest.raises(CheckpointError, match=r"cursors of \[\[8, 1, 4\]\] and this run of \[\[4, 1, 4\]\]"):
        other.restore(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: 7, "should be a valid dictionary"),
        (lambda state: None, "should be a valid dictionary"),
        (lambda state: {}, "field required"),
        (lambda state: {**state, "cursors": 7}, "cursors: input should be a valid list, got 7"),
        (lambda state: {**state, "cursors": [[[0, 0, 0, 0]]]}, r"cursors\[0\]\[0\]\[0\]: .* valid list"),
        (lambda state: {**state, "cursors": [[[[2**64] * 4]] * 8]}, "less than 281474976710656, got"),
        (lambda state: {**state, "cursors": [[[[10**5000] * 4]] * 8]}, "got a number of 16610 bits"),
        (lambda state: {**state, "cursors": [[[[-1] * 4]] * 8]}, "greater than or equal to 0, got -1"),
        (lambda state: {**state, "cursors": [[[[0.5] * 4]] * 8]}, "valid integer, got 0.5"),
        (lambda state: {**state, "cursors": [[[["0"] * 4]] * 8]}, "valid integer, got '0'"),
        (lambda state: {**state, "cursors": [[[[0] * 4]] * 7 + [[[0] * 3]]]}, r"cursors of \[\[\]\]"),
        (lambda state: {**state, "cursors": []}, r"cursors of \[\]"),
        (
            lambda state: {**state, "counts": [0]},
            "counts 1 kinds of broken data, wanted 6",
        ),
        (lambda state: {**state, "counts": ["many"] * 6}, r"counts\[0\]: .* valid integer"),
    ],
)
def test_what_is_no_state_is_refused(
    shards: str, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    progress = begin(DataConfig(shards=(shards,)), tmp_path)
    before = progress.state()
    with pytest.raises(CheckpointError, match=said) as caught:
        progress.restore(change(before))
    assert len(str(caught.value)) < 500
    assert progress.state() == before


NUMBERS = strategies.one_of(
    strategies.just(0), strategies.sampled_from([-1, 2**48, 2**64, 10**300, 0.5, True, None, "0", math.nan])
)


@effort(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_state_is_taken_or_refused(shards: str, tmp_path: Path, data: strategies.DataObject) -> None:
    progress = begin(DataConfig(shards=(shards,), num_streams=2), tmp_path)
    lists = strategies.recursive(NUMBERS, lambda inner: strategies.lists(inner, max_size=4), max_leaves=20)
    shaped = strategies.just([[[[0] * 4], [[0] * 4]]])
    state = data.draw(
        lists
        | strategies.fixed_dictionaries(
            {"cursors": shaped | lists, "counts": lists | strategies.just([0] * 6)}
        )
    )
    try:
        progress.restore(state)
    except CheckpointError:
        return
    assert progress.state() == state


def test_what_is_no_list_is_told_before_the_work(shards: str, tmp_path: Path) -> None:
    (tmp_path / LISTING).mkdir()
    with pytest.raises(DataError, match=r"broken\.jsonl: is a folder; give a file"):
        begin(DataConfig(shards=(shards,)), tmp_path)


def test_what_is_left_out_is_told_and_is_not_broken(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = begin(DataConfig(shards=(shards,)), tmp_path)
    progress.add(marks(1, ReadError("left out", "a.tar", "1 members are links"), shards=1))
    assert set(progress.broken(8, 0.0).values()) == {0}
    assert progress.in_words() == ""
    assert "a.tar: 1 members are links" in capsys.readouterr().out
    assert json.loads((tmp_path / LISTING).read_text())["cause"] == "left out"


def test_what_is_broken_is_counted_and_listed(shards: str, tmp_path: Path) -> None:
    progress = begin(DataConfig(shards=(shards,)), tmp_path)
    assert progress.broken(8, 0.01) == dict.fromkeys(
        ("image", "missing", "unreadable", "truncated", "empty"), 0
    )
    assert not (tmp_path / LISTING).exists()
    assert progress.in_words() == ""
    faults = [ReadError("image", "a.tar/0.jpg", "no"), ReadError("missing", "b.tar", "no such shard")]
    for _ in range(3):
        progress.add(marks(1, *faults, shards=2))
    counts = progress.broken(24, 0.01)
    assert counts == {"image": 3, "missing": 3, "unreadable": 0, "truncated": 0, "empty": 0}
    assert progress.in_words() == "3 images that cannot be decoded, 3 missing shards"
    lines = [json.loads(line) for line in (tmp_path / LISTING).read_text().splitlines()]
    assert lines == [fault._asdict() for fault in faults]


@pytest.mark.parametrize(("cause", "things"), [("image", "11 of 811 images"), ("empty", "11 of 800 shards")])
def test_too_much_that_is_broken_stops(shards: str, tmp_path: Path, cause: str, things: str) -> None:
    progress = begin(DataConfig(shards=(shards,)), tmp_path)
    progress.add(marks(1, *[ReadError(cause, f"{n}", "") for n in range(11)], shards=800))  # type: ignore[arg-type]
    progress.broken(800, 0.02)
    with pytest.raises(DataError, match=f"{things} cannot be read"):
        progress.broken(800, 0.01)
    assert len((tmp_path / LISTING).read_text().splitlines()) == 11


def test_data_that_are_no_stream_have_no_progress(tmp_path: Path) -> None:
    config = replace(settings(DataConfig()), out=tmp_path)
    images = open_sources(DataConfig(scenes=3))
    progress = Progress((), make_partition(config, 1), Group(), 0, None)
    progress.add([])
    assert progress.state()["cursors"] == []
    progress.restore(progress.state())
    assert len(images) == 1


def test_workers_that_cannot_share_the_lanes_are_fewer(shards: str, tmp_path: Path) -> None:
    shares = begin(DataConfig(shards=(shards,)), tmp_path, others=4).shares([SIDE, SIDE])
    assert fewer_workers(2, shares) == fewer_workers(4, shares) == fewer_workers(0, shares) == ""
    assert fewer_workers(3, shares).startswith("2 loader processes instead of 3: they share the 8 and 4")

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
from torch import Tensor

from radio.dist import Ranks
from radio.errors import CheckpointError, DataError
from radio.types import Features
from train.config import DataConfig
from train.data.errors import ERROR_LIST, ReadError
from train.data.loader import Loader, share_evenly
from train.data.streams import CURSOR, open_images
from train.groups import TeacherGroup, make_partition

from ..conftest import CPU
from .conftest import SIDE, follow, loader_of, settings


def begin(data: DataConfig, folder: Path, world: int = 1, rank: int = 0, **options: int) -> Loader:
    config = settings(data, 8, **options)
    return loader_of(config, make_partition(config, world), rank, folder)


def taught(step: int, group: TeacherGroup, images: Tensor) -> dict[str, Features]:
    """No teacher says anything."""
    return {}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_state_goes_through_json_and_back(shards: str, tmp_path: Path, ahead: bool) -> None:
    """It is that of the batch that was yielded last, also where the next one is made already."""
    data = DataConfig(shards=(shards,))
    config = settings(data, 8, others=4)
    loader = begin(data, tmp_path, others=4)
    batches = loader.batches(0, taught, ahead=ahead)
    for _ in range(5):
        assert [len(batch.images) for batch in next(batches).groups] == [8, 4]
    state = json.loads(json.dumps(loader.state_dict()))
    batches.close()  # type: ignore[attr-defined]
    again = begin(data, tmp_path, others=4)
    again.load_state_dict(state)
    assert again.state_dict() == state
    rest = list(again.rows(range(5, 9)))
    assert [[rows.keys for rows in step] for step in rest] == [
        [rows.keys for rows in step] for step in list(follow(config, range(9)))[5:]
    ]


def test_ranks_take_their_parts_of_a_state(shards: str, tmp_path: Path) -> None:
    data = DataConfig(shards=(shards,))
    loader = begin(data, tmp_path)
    cursors = torch.arange(8 * CURSOR).reshape(1, 8, 1, CURSOR).tolist()
    loader.errors.add(7, [ReadError("missing", "a", "")])
    state = {**loader.state_dict(), "cursors": cursors}
    parts = [begin(data, tmp_path, world=2, rank=rank) for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
    one, other = (torch.tensor(part.state_dict()["cursors"]) for part in parts)
    assert not one[:, 4:].any() and not other[:, :4].any()
    assert (one + other).tolist() == cursors
    counts = [part.state_dict()["counts"] for part in parts]  # each alone here, and so of its own
    assert counts == [[0, 1, 0, 0, 0, 7], [0] * 6]


def test_a_state_of_other_lanes_is_refused(shards: str, tmp_path: Path) -> None:
    state = begin(DataConfig(shards=(shards,)), tmp_path).state_dict()
    other = begin(DataConfig(shards=(shards,), num_streams=4), tmp_path)
    with pytest.raises(CheckpointError, match=r"cursors of \[\[8, 1, 4\]\] and this run of \[\[4, 1, 4\]\]"):
        other.load_state_dict(state)


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
    loader = begin(DataConfig(shards=(shards,)), tmp_path)
    before = loader.state_dict()
    with pytest.raises(CheckpointError, match=said) as caught:
        loader.load_state_dict(change(before))
    assert len(str(caught.value)) < 500
    assert loader.state_dict() == before


NUMBERS = strategies.one_of(
    strategies.just(0), strategies.sampled_from([-1, 2**48, 2**64, 10**300, 0.5, True, None, "0", math.nan])
)


@effort(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_state_is_taken_or_refused(shards: str, tmp_path: Path, data: strategies.DataObject) -> None:
    loader = begin(DataConfig(shards=(shards,), num_streams=2), tmp_path)
    lists = strategies.recursive(NUMBERS, lambda inner: strategies.lists(inner, max_size=4), max_leaves=20)
    shaped = strategies.just([[[[0] * 4], [[0] * 4]]])
    state = data.draw(
        lists
        | strategies.fixed_dictionaries(
            {"cursors": shaped | lists, "counts": lists | strategies.just([0] * 6)}
        )
    )
    try:
        loader.load_state_dict(state)
    except CheckpointError:
        return
    assert loader.state_dict() == state


def test_what_is_no_list_is_told_before_the_work(shards: str, tmp_path: Path) -> None:
    (tmp_path / ERROR_LIST).mkdir()
    with pytest.raises(DataError, match=r"broken\.jsonl: is a folder; give a file"):
        begin(DataConfig(shards=(shards,)), tmp_path)


def test_what_is_left_out_is_told_and_is_not_broken(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = begin(DataConfig(shards=(shards,)), tmp_path).errors
    errors.add(1, [ReadError("left out", "a.tar", "1 members are links")])
    assert set(errors.check(8, 0.0).values()) == {0}
    assert errors.describe() == ""
    assert "a.tar: 1 members are links" in capsys.readouterr().out
    assert json.loads((tmp_path / ERROR_LIST).read_text())["cause"] == "left out"


def test_what_is_broken_is_counted_and_listed(shards: str, tmp_path: Path) -> None:
    errors = begin(DataConfig(shards=(shards,)), tmp_path).errors
    assert errors.check(8, 0.01) == dict.fromkeys(("image", "missing", "unreadable", "truncated", "empty"), 0)
    assert not (tmp_path / ERROR_LIST).exists()
    assert errors.describe() == ""
    read_errors = [ReadError("image", "a.tar/0.jpg", "no"), ReadError("missing", "b.tar", "no such shard")]
    for _ in range(3):
        errors.add(2, read_errors)
    counts = errors.check(24, 0.01)
    assert counts == {"image": 3, "missing": 3, "unreadable": 0, "truncated": 0, "empty": 0}
    assert errors.describe() == "3 images that cannot be decoded, 3 missing shards"
    lines = [json.loads(line) for line in (tmp_path / ERROR_LIST).read_text().splitlines()]
    assert lines == [error._asdict() for error in read_errors]


@pytest.mark.parametrize(("cause", "things"), [("image", "11 of 811 images"), ("empty", "11 of 800 shards")])
def test_too_much_that_is_broken_stops(shards: str, tmp_path: Path, cause: str, things: str) -> None:
    errors = begin(DataConfig(shards=(shards,)), tmp_path).errors
    errors.add(800, [ReadError(cause, f"{n}", "") for n in range(11)])  # type: ignore[arg-type]
    errors.check(800, 0.02)
    with pytest.raises(DataError, match=f"{things} cannot be read"):
        errors.check(800, 0.01)
    assert len((tmp_path / ERROR_LIST).read_text().splitlines()) == 11


def test_data_that_are_no_stream_have_no_cursors(tmp_path: Path) -> None:
    config = replace(settings(DataConfig(scenes=3)), out=tmp_path)
    images = open_images(config.data)
    loader = Loader(config, make_partition(config, 1), Ranks(), images, [{SIDE: SIDE}], CPU, print)
    assert loader.state_dict()["cursors"] == []
    loader.load_state_dict(loader.state_dict())


def test_workers_that_cannot_share_the_lanes_are_fewer(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [share_evenly(count, [8, 4]) for count in (0, 2, 3, 4)] == [0, 2, 2, 4]
    config = settings(DataConfig(shards=(shards,)), 8, others=4)
    for workers, line in (
        (2, ""),
        (3, "2 loader processes instead of 3: they share the 8 and 4 streams of "),
    ):
        chosen = replace(config, data=replace(config.data, workers=workers))
        loader = loader_of(chosen, make_partition(chosen, 1), 0, tmp_path)
        assert len(list(loader.rows(range(1)))) == 1
        assert capsys.readouterr().out.startswith(line)

"""The same images in the same order for any number of ranks and workers, and from any step on."""

from __future__ import annotations

import os
import resource
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as effort
from torch.utils.data import DataLoader

from radio.errors import ConfigError, DataError, SizeError
from radio.images import decode
from train.config import DataConfig
from train.data.crops import random_view
from train.data.loader import Rows, make_room_for_files, rows_of
from train.data.streams import assign_streams, open_sources
from train.groups import make_partition

from ..conftest import image_bytes
from .conftest import SIDE, follow, loader_of, settings


def keys(rows: list[tuple[Rows, ...]]) -> list[tuple[str, ...]]:
    return [tuple(chain.from_iterable(group.keys for group in step)) for step in rows]


def test_every_epoch_gives_every_image_once(shards: str) -> None:
    seen = Counter(
        chain.from_iterable(
            keys(list(follow(settings(DataConfig(shards=(shards,), num_streams=1)), range(21))))
        )
    )
    assert sum(range(5, 12)) == 56
    assert len(seen) == 56
    assert set(seen.values()) == {3}  # 21 steps of 8


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("count", [1, 3])
def test_few_shards_are_dealt_in_parts(shards: str, lanes: int, count: int) -> None:
    few = shards.replace("000..006", f"000..{count - 1:03d}")
    size = sum(range(5, 5 + count))
    rows = list(follow(settings(DataConfig(shards=(few,), num_streams=lanes)), range(size * 5)))
    seen = Counter(chain.from_iterable(keys(rows)))
    assert len(seen) == size
    assert max(seen.values()) - min(seen.values()) <= (0 if lanes == 1 else 20)  # of 40 times each
    if lanes > size:
        return
    assert len(set(keys(rows)[0])) >= min(size, 5)  # not eight times the same image


def test_crops_are_functions_of_the_position(shards: str) -> None:
    config = settings(DataConfig(shards=(shards,)), batch_size=4, others=2)
    for step, groups in enumerate(follow(config, range(5))):
        position = 6 * step
        for rows in groups:
            for pixels, key in zip(rows.pixels, rows.keys, strict=True):
                number = int(key.split("/")[1].removesuffix(".jpg"))
                image = decode(image_bytes(number, "JPEG", (20, 24)))
                assert torch.equal(pixels, random_view(image, config.data, SIDE, config.seed, position))
                position += 1


def test_groups_go_through_the_data_in_orders_of_their_own(shards: str) -> None:
    config = settings(DataConfig(shards=(shards,)), batch_size=8, others=4)
    rows = list(follow(config, range(14)))
    first, second = ([key for step in rows for key in step[group].keys] for group in (0, 1))
    assert first[:56] != second
    assert len(set(first)) == 56
    assert len(set(second)) > 40


@pytest.mark.parametrize("kind", ["shards", "weighted"])
@pytest.mark.parametrize(
    ("world", "placement"), [(1, "shared"), (2, "shared"), (4, "shared"), (2, "dedicated"), (3, "dedicated")]
)
def test_ranks_and_workers_change_nothing(shards: str, kind: str, world: int, placement: str) -> None:
    data = DataConfig(shards=(shards,))
    if kind == "weighted":
        data = DataConfig(shards=(shards.replace("006", "004"),), scenes=50, weights=(2, 1))
    config = replace(settings(data, batch_size=8, others=4), teacher_placement=placement)
    alone = list(follow(config, range(9)))
    shared = make_partition(config, world)
    for workers in (0,) if world in (3, 4) else (0, 1, 2):
        ranks = [
            list(follow(config, range(9), partition=shared, rank=r, workers=workers)) for r in range(world)
        ]
        for step, wanted in enumerate(alone):
            for number, group in enumerate(shared.groups):
                parts = [ranks[rank][step][shared.of(rank).index(group)] for rank in group.ranks]
                assert tuple(chain.from_iterable(part.keys for part in parts)) == wanted[number].keys
                assert torch.equal(torch.cat([part.pixels for part in parts]), wanted[number].pixels)
                assert torch.equal(torch.cat([part.cursors for part in parts]), wanted[number].cursors)


@effort(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_a_stream_goes_on_from_anywhere(shards: str, data: strategies.DataObject) -> None:
    lanes = data.draw(strategies.sampled_from([1, 2, 4, 8]))
    stop = data.draw(strategies.integers(1, 11))
    workers = data.draw(strategies.sampled_from([0, 0, 0, 1]))
    config = settings(DataConfig(shards=(shards,), scenes=20, weights=(3, 1), num_streams=lanes), 8, others=4)
    whole = list(follow(config, range(12)))
    cursors = [rows.cursors for rows in whole[stop - 1]]
    rest = list(follow(config, range(stop, 12), cursors=cursors, workers=workers))
    assert keys(rest) == keys(whole[stop:])
    for one, other in zip(chain(*rest), chain(*whole[stop:]), strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.cursors, other.cursors)


def test_what_was_read_is_not_read_again(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    from train.data import shards as module

    genuine = module.open_shard

    def watched(name: str, position: int = 0):  # type: ignore[no-untyped-def]
        tar = genuine(name, position)
        inner = tar.read
        tar.read = lambda member: (read.append((name, member.start)), inner(member))[1]  # type: ignore[method-assign]
        return tar

    monkeypatch.setattr(module, "open_shard", watched)
    config = settings(DataConfig(shards=(shards,), num_streams=2))
    whole = list(follow(config, range(7)))  # one epoch
    once = list(read)
    assert len(once) == len(set(once)) == 56
    read.clear()
    before = list(follow(config, range(4)))
    list(follow(config, range(4, 7), cursors=[before[-1][0].cursors]))
    assert sorted(read) == sorted(once)
    assert torch.equal(before[-1][0].cursors, whole[3][0].cursors)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_is_joined_into_page_locked_memory(
    shards: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Whatever the parts, what is handed on is the buffer itself, without another copy."""
    buffers: list[torch.Tensor] = []

    def page_locked(shape: tuple[int, ...]) -> torch.Tensor:
        buffers.append(torch.empty(shape, dtype=torch.uint8))
        return buffers[-1]

    monkeypatch.setattr("train.data.loader._page_locked", page_locked)
    config = settings(DataConfig(shards=(shards,)), batch_size=8, others=4)
    steps = list(follow(config, range(3), workers=workers, pin=True))
    rows = list(chain.from_iterable(steps))
    assert len(buffers) == len(rows) == 6
    assert all(row.pixels.data_ptr() == buffer.data_ptr() for row, buffer in zip(rows, buffers, strict=True))
    for row, wanted in zip(rows, chain.from_iterable(follow(config, range(3))), strict=True):
        assert torch.equal(row.pixels, wanted.pixels)
        assert row.keys == wanted.keys
        assert torch.equal(row.cursors, wanted.cursors)


class Failing(torch.utils.data.Dataset[int]):
    """Whose items fail in a way of their own."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if self.error is None:
            os._exit(3)
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        DataError("no image: DataError of a name"),
        SizeError("cannot crop a 1x2 image"),
        MemoryError("no room"),
        FileNotFoundError("none of that name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_loader_processes_come_as_they_were(error: Exception, workers: int) -> None:
    with pytest.raises(type(error)) as caught:
        list(rows_of(iter(DataLoader(Failing(error), num_workers=workers))))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


def test_a_loader_process_that_has_ended_is_one_error() -> None:
    with pytest.raises(DataError, match=r"^a loader process has ended, .* take fewer --data\.workers"):
        list(rows_of(iter(DataLoader(Failing(None), num_workers=1))))


def test_there_is_room_for_what_is_read_ahead(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("train.data.loader.make_room_for_files", asked.append)
    next(iter(follow(settings(DataConfig(shards=(shards,)), 8, others=4), range(1), workers=2)))
    assert asked == [2 * 4 * 2 * 2]  # processes, steps, tensors, groups


def test_weights_are_shares_of_every_stretch(shards: str) -> None:
    data = DataConfig(
        shards=(shards.replace("006", "001"), shards.replace("000..006", "002..006")), scenes=40
    )
    config = settings(replace(data, weights=(0.5, 3, 1.5)), batch_size=16)
    seen: Counter[str] = Counter()
    for step in follow(config, range(50)):
        for key in step[0].keys:
            name = "scenes" if "/" not in key else "first" if key < "002" else "second"
            seen[name] += 1
    assert sum(seen.values()) == 800
    assert seen["first"] == pytest.approx(80, abs=32)  # two a lane
    assert seen["second"] == pytest.approx(480, abs=32)
    assert seen["scenes"] == pytest.approx(240, abs=32)


def test_cursors_of_all_ranks_come_together(shards: str, tmp_path: Path) -> None:
    config = settings(DataConfig(shards=(shards,)), batch_size=8, others=4)
    whole = list(follow(config, range(3)))[-1]
    shared = make_partition(config, 3)
    assignments = assign_streams(config, shared)
    total = [each.zeros(1) for each in assignments]
    for rank in range(3):
        loader = loader_of(config, shared, rank, tmp_path)
        for _ in loader.batches(97, lambda step, group, images: {}, ahead=rank == 1):  # three steps
            pass
        total = [a + torch.tensor(b) for a, b in zip(total, loader.state_dict()["cursors"], strict=True)]
    assert all(torch.equal(a, b.cursors) for a, b in zip(total, whole, strict=True))
    assert [len(each.local(shared, shared.groups[each.group].ranks[0])) for each in assignments] == [
        8 // len(shared.groups[0].ranks),
        4 // len(shared.groups[1].ranks),
    ]


def test_lanes_that_ranks_cannot_share_are_refused(shards: str) -> None:
    config = settings(DataConfig(shards=(shards,), num_streams=4), batch_size=12)
    with pytest.raises(
        ConfigError, match=r"the 4 streams of a cannot be shared .* 3 ranks.*--data\.num-streams 12"
    ):
        assign_streams(config, make_partition(config, 3))
    with pytest.raises(ConfigError, match=r"--data\.num-streams 0 cannot be"):
        assign_streams(replace(config, data=replace(config.data, num_streams=0)), make_partition(config, 1))


def test_sources_have_to_be_named_and_weighted(shards: str) -> None:
    with pytest.raises(ConfigError, match=r"no data: give --data\.shards"):
        open_sources(DataConfig())
    with pytest.raises(ConfigError, match=r"beside folders or scenes give --data\.weights"):
        open_sources(DataConfig(shards=(shards,), scenes=3))
    with pytest.raises(ConfigError, match="wanted a number above zero for each of the 2 sources"):
        open_sources(DataConfig(shards=(shards,), scenes=3, weights=(1,)))
    with pytest.raises(ConfigError, match="wanted a number above zero"):
        open_sources(DataConfig(shards=(shards,), scenes=3, weights=(1, 0)))


def test_a_process_may_hold_a_file_for_every_lane() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert before[1] >= 2000, "the test needs a limit that can be raised"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, before[1]))
        make_room_for_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (700, before[1])
        make_room_for_files(1024)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024 + 512, before[1])
        make_room_for_files(10**9)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

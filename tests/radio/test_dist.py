from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from radio import dist
from radio.dist import Ranks, agree, current, joined
from radio.errors import RadioError


def test_alone_everything_is_the_identity() -> None:
    group = Ranks()
    array = torch.arange(3)
    group.barrier()
    assert group.leads
    assert torch.equal(group.gather(array), array[None])
    assert torch.equal(group.sum(array), array)
    assert current() == Ranks()


def test_torchruns_environment_makes_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with joined() as group:
        assert distributed.is_initialized()
        assert group == Ranks(0, 1)
        with joined() as inner:  # already in a group
            assert inner == group
    assert not distributed.is_initialized()


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert group == Ranks()
        assert not distributed.is_initialized()


def test_ranks_agree_on_a_word_that_no_earlier_start_had() -> None:
    """Whichever comes first, and with the words of earlier starts in the store."""
    store = distributed.HashStore()
    words = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        with ThreadPoolExecutor(3) as ranks:
            found = [ranks.submit(agree, store, rank, 3) for rank in order]
        (word,) = {one.result() for one in found}
        words.append(word)
    assert len(set(words)) == 3
    assert agree(distributed.HashStore(), 0, 1)


def test_behind_nccl_there_is_one_group_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of 64 ranks: every task of every evaluation asks for the group."""
    made: list[str] = []
    monkeypatch.setattr(distributed, "new_group", lambda backend, timeout: made.append(backend) or fake)
    distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=64)
    fake = distributed.group.WORLD
    try:
        assert current() == current() == current() == Ranks(5, 64, fake)
        assert made == ["gloo"]
    finally:
        distributed.destroy_process_group()


def test_the_leader_works_alone_and_its_error_is_everybodys() -> None:
    class Two(Ranks):
        """What the leader said is what a rank hears."""

        def gather_objects(self, value: Any) -> list[Any]:
            said.append(value)
            return [said[0]]

    said: list[Any] = []
    done: list[int] = []
    for rank in (0, 1):
        Two(rank, 2).on_leader(lambda rank=rank: done.append(rank))
    assert done == [0]

    def fail() -> None:
        done.append(1)
        raise RadioError("no such text")

    said.clear()
    for rank in (0, 1):
        with pytest.raises(RadioError, match="no such text"):
            Two(rank, 2).on_leader(fail)
    assert done == [0, 1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"RANK": "1"}, "did not find one another at 127.0.0.1:1 "),  # nobody listens there
        (
            {"RANK": "0", "MASTER_PORT": "0"},
            "did not find one another at 127.0.0.1:0 ",
        ),  # the others never come
        ({"RANK": ""}, "did not find one another"),
        ({"RANK": "x"}, "did not find one another"),
        ({"RANK": "2", "MASTER_PORT": "0"}, "did not find one another"),
        ({"RANK": "0", "WORLD_SIZE": "-2", "MASTER_PORT": "0"}, "did not find one another"),
        ({"RANK": "0", "MASTER_PORT": "70000"}, "did not find one another"),
    ],
)
def test_ranks_that_do_not_meet_say_so_soon(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(dist, "_MEETING", timedelta(seconds=1))
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **changes}
    for name, value in whole.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RadioError, match=reason), joined():
        pass
    assert not distributed.is_initialized()


def test_an_old_word_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_MEETING", timedelta(seconds=0.1))
    store = distributed.HashStore()
    store.set("am-radio/word", "old")
    with pytest.raises(TimeoutError, match="rank 0 gave no answer"):
        agree(store, 1, 2)

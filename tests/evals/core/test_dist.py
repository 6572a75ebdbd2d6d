from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as distributed

from evals.core.dist import Group, agree, current, joined


def test_alone_everything_is_the_identity() -> None:
    group = Group()
    array = torch.arange(3)
    group.barrier()
    assert group.leads
    assert torch.equal(group.gather(array), array[None])
    assert torch.equal(group.sum(array), array)
    assert current() == Group()


def test_torchruns_environment_makes_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with joined() as group:
        assert distributed.is_initialized()
        assert group == Group(0, 1)
        with joined() as inner:  # already in a group
            assert inner == group
    assert not distributed.is_initialized()


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert group == Group()
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

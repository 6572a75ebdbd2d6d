from __future__ import annotations

import pytest
import torch
import torch.distributed as distributed

from evals.core.dist import Group, current, joined


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

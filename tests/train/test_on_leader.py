"""What the first rank finds reaches every rank, its errors too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from radio.dist import Ranks
from radio.errors import ConfigError, RadioError
from radio.resources import NAME
from train.checkpoints import CheckpointManager
from train.commands import _alone

from .ranks import on_ranks
from .test_damaged_states import filled, open_states, tensors


def test_answers_and_errors_of_the_first_rank_are_everybodys(tmp_path: Path) -> None:
    def work(group: Ranks) -> list[object]:
        def fail() -> int:
            raise (ConfigError("no") if group.leads else AssertionError)

        def full() -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

        found: list[object] = [group.on_leader(lambda: group.rank + 7)]
        for work in (fail, full):
            try:
                group.on_leader(work)
            except (RadioError, OSError) as error:
                found.append((type(error), str(error)))
        return found

    wanted = [7, (ConfigError, "no"), (OSError, "[Errno 28] No space left on device: 'file'")]
    assert on_ranks(2, tmp_path, work) == [wanted] * 2


def test_all_ranks_hold_one_folder_and_leave_a_damaged_state_aside(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (shard,) = filled(out).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])

    def work(group: Ranks) -> tuple[int, float, bool]:
        with _alone(out, group):
            held = (out / NAME).is_file()
            into = tensors(0)
            states = open_states(out)
            mine = CheckpointManager(
                out / "state",
                group,
                states.settings,
                keep_last=2,
                keep_every=0,
                log=print,
                schema=states.schema,
            )
            found = mine.resume(into)
            group.barrier()
        assert found is not None
        return found.step, float(into["a"][0, 0]), held

    assert on_ranks(2, tmp_path / "ranks", work) == [(4, 4.0, True)] * 2
    assert not (out / NAME).exists()


def test_alone_it_is_a_call() -> None:
    assert Ranks().on_leader(lambda: "x") == "x"
    with pytest.raises(ConfigError, match="no"):
        Ranks().on_leader(lambda: (_ for _ in ()).throw(ConfigError("no")))

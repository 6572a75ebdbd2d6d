"""Several ranks on this machine, forked from the test: nothing is imported twice, and they start at once."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from radio.dist import Ranks, current


def on_ranks(world: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each of `world` gloo ranks, in order of rank; they meet in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    forked = multiprocessing.get_context("fork")
    ranks = [forked.Process(target=_rank, args=(rank, world, folder, work)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    for rank in ranks:
        rank.kill()
    told = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not told, "\n".join(told)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, work: Callable[[Ranks], Any]) -> None:
    torch.set_num_threads(1)
    try:
        store = distributed.FileStore(str(folder / "store"), world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        torch.save(work(current()), folder / f"{rank}.pt")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise

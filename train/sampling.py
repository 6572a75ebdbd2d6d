"""What is random in a run, each draw a function of the seed and of where in the run it is asked for.

Nothing here depends on batch size, workers or ranks, and a resumed run draws what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

Purpose = Literal["order", "crop", "positions", "window"]
_STREAMS: dict[Purpose, int] = {"order": 0, "crop": 1, "positions": 2, "window": 3}


def seed_of(seed: int, purpose: Purpose, index: int) -> int:
    """A 63-bit seed for one purpose at one place of the run."""
    words = np.random.SeedSequence((seed, _STREAMS[purpose], index)).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def generator(seed: int, purpose: Purpose, index: int) -> torch.Generator:
    """A CPU generator for one purpose at one place of the run."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))


def picture_at(position: int, count: int, seed: int) -> int:
    """Which of `count` pictures stands at a position of the endless, per-epoch shuffled stream."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.Generator(np.random.Philox(seed_of(seed, "order", epoch))).permutation(count)


def draw_window(candidates: tuple[int, ...], seed: int, step: int) -> int | None:
    """The attention window of one step, uniform over the candidates; None without any."""
    if not candidates:
        return None
    pick = torch.randint(len(candidates), (), generator=generator(seed, "window", step))
    return candidates[int(pick)]


class StepSampler(Sampler[list[int]]):
    """Batches of stream positions from one step on, this rank's share of each."""

    def __init__(self, start: int, steps: int, batch_size: int, rank: int, world: int) -> None:
        self.start, self.steps = start, steps
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * share
            yield list(range(first, first + share))

"""Randomness of a run: each draw depends only on the seed and the position in the run.

It does not depend on batch size, workers or ranks, and a resumed run draws the same as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Sampler

Purpose = Literal["order", "crop", "positions", "window", "group", "source", "lane"]
_STREAMS: dict[Purpose, int] = {name: number for number, name in enumerate(get_args(Purpose))}


def seed_of(seed: int, purpose: Purpose, index: int) -> int:
    """Derive a 63-bit seed for one purpose at one position of the run."""
    words = np.random.SeedSequence((seed, _STREAMS[purpose], index)).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def generator(seed: int, purpose: Purpose, index: int) -> torch.Generator:
    """Create a CPU generator for one purpose at one position of the run."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))


def image_at(position: int, count: int, seed: int) -> int:
    """Return which of `count` images is at a position of the endless stream, shuffled per epoch."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


@lru_cache(maxsize=16)  # lanes may be in different epochs of different sources
def _order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.Generator(np.random.Philox(seed_of(seed, "order", epoch))).permutation(count)


def draw_window(candidates: tuple[int, ...], seed: int, step: int) -> int | None:
    """Sample the attention window of a step uniformly from the candidates; None if there are none."""
    if not candidates:
        return None
    pick = torch.randint(len(candidates), (), generator=generator(seed, "window", step))
    return candidates[int(pick)]


class StepSampler(Sampler[list[int]]):
    """Yields a rank's stream positions of each step, out of the step's `batch_size`, from `start` on."""

    def __init__(self, start: int, steps: int, batch_size: int, rows: Sequence[int]) -> None:
        self.start, self.steps = start, steps
        self.batch_size, self.rows = batch_size, tuple(rows)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            yield [step * self.batch_size + row for row in self.rows]

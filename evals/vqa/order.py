"""The order of training samples: a function of the seed, in batches of one modality and of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
from torch.utils.data import Sampler

# Letters: N samples, B samples a step.


def epoch_order(
    lengths: Sequence[int], modalities: Sequence[bool], batch: int, seed: int, epoch: int
) -> list[int]:
    """Every place once: batches of one modality, sorted by length within; what is left over comes last.

    Each modality is shuffled and cut into batches of B; the batches are shuffled. Sorting within a batch
    does not change what a step learns from, but pieces of the batch need less padding.
    """
    generator = np.random.default_rng([seed, epoch])
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        places = np.flatnonzero(np.array(modalities, dtype=bool) == modality)
        shuffled = generator.permutation(places).tolist()
        whole = len(shuffled) // batch * batch
        batches += [shuffled[start : start + batch] for start in range(0, whole, batch)]
        rest += shuffled[whole:]
    chosen = [batches[place] for place in generator.permutation(len(batches))]
    parts = [*chosen, *(rest[start : start + batch] for start in range(0, len(rest), batch))]
    return [place for part in parts for place in sorted(part, key=lambda p: (-lengths[p], p))]


def order(
    lengths: Sequence[int], modalities: Sequence[bool], batch: int, steps: int, seed: int
) -> Iterator[int]:
    """The places of `steps` batches, through as many epochs as they take.

    An epoch's last, incomplete batch is filled up from the next epoch.
    """
    left, epoch = steps * batch, 0
    while left:
        for place in epoch_order(lengths, modalities, batch, seed, epoch)[:left]:
            yield place
            left -= 1
        epoch += 1


@final
class Order(Sampler[int]):
    """What is left of a run's order after the steps that are done."""

    def __init__(self, places: Sequence[int]) -> None:
        self._places = list(places)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

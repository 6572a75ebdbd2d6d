"""The order of training samples: determined by the seed, in batches of one modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
from torch.utils.data import Sampler

# Letters: N samples, B samples per step.


def epoch_order(
    lengths: Sequence[int], modalities: Sequence[bool], batch: int, seed: int, epoch: int
) -> list[int]:
    """Order the indices of an epoch: batches of one modality, sorted by length within, incomplete ones last.

    Each modality is shuffled and cut into batches of B; the batches are shuffled. Sorting within a batch
    does not change the samples of a step, but its micro-batches need less padding.
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
    """Yield the sample indices of `steps` batches, over as many epochs as they need.

    An epoch's last, incomplete batch is filled from the next epoch.
    """
    left, epoch = steps * batch, 0
    while left:
        for place in epoch_order(lengths, modalities, batch, seed, epoch)[:left]:
            yield place
            left -= 1
        epoch += 1


@final
class Order(Sampler[int]):
    """The remaining sample indices of a run, after the finished steps."""

    def __init__(self, places: Sequence[int]) -> None:
        self._places = list(places)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

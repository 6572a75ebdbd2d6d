"""The weighted vote of the neighbours (Z. Wu et al. 2018, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from radio.errors import DataError

# Letters: B queries, C classes, k neighbours.


def votes(
    similarities: Tensor, labels: Tensor, ks: Sequence[int], num_classes: int, temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """For each k, ascending: k and every class's votes, float64 [B, C], the sum of exp((s - 1) / temperature).

    Wu et al. write exp(s / temperature); the constant factor changes no order and keeps the sums near one.

    Args:
        similarities: [B, k] cosines, the nearest first.
        labels: [B, k] classes, -1 where there is no neighbour.
        ks: which k; each takes the first k columns, all of them where there are fewer.

    Raises:
        DataError: a temperature that is not above zero.
    """
    if temperature <= 0:
        raise DataError(f"a temperature of {temperature} gives no weights; give one above 0, such as 0.07")
    weights = ((similarities.double() - 1) / temperature).exp().masked_fill(labels < 0, 0.0)
    totals = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    done = 0
    for k in sorted(set(ks)):
        # A sum over neighbours in a fixed order, one column after the other: O(B C) memory.
        totals.scatter_add_(1, labels[:, done:k].clamp(min=0), weights[:, done:k])
        done = min(k, labels.shape[1])
        yield k, totals


def ranking(totals: Tensor, count: int) -> Tensor:
    """The classes with most votes, [B, count]; equal ones by class, -1 where no further class has a vote."""
    values, classes = totals.sort(dim=1, descending=True, stable=True)
    ranked = classes.masked_fill(values <= 0, -1)[:, :count]
    missing = count - ranked.shape[1]
    return torch.nn.functional.pad(ranked, (0, missing), value=-1) if missing > 0 else ranked

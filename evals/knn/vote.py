"""The weighted vote of the neighbours (Z. Wu et al. 2018, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import DataError

# Letters: B queries, C classes, k neighbours.


def vote(
    similarities: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    *,
    num_classes: int,
    temperature: float,
    places: int = 5,
) -> dict[int, Tensor]:
    """Return for each k the classes with most votes, [B, places] int64, padded by -1.

    A neighbour of similarity s votes exp(s / temperature) for its class. The sums are computed in float64
    relative to the nearest neighbour's vote, which does not change the order; ties go to the lower class.

    Args:
        similarities: [B, k] cosines, the nearest first.
        labels: [B, k] classes, -1 for a missing neighbour.
        ks: each uses the first k columns, or all of them if there are fewer.

    Raises:
        DataError: a temperature that is not above zero.
    """
    if not 0 < temperature < float("inf"):
        raise DataError(f"a temperature of {temperature} gives no weights; give one above 0, such as 0.07")
    scaled = (similarities.double() - similarities[:, :1].double()) / temperature
    weights = scaled.exp().masked_fill(labels < 0, 0.0)
    totals = torch.zeros(len(labels), num_classes, dtype=torch.float64)  # O(B C), never O(B k C)
    rankings, done = {}, 0
    for k in sorted(set(ks)):
        totals.scatter_add_(1, labels[:, done:k].clamp(min=0), weights[:, done:k])
        done = min(k, labels.shape[1])
        rankings[k] = _rank(totals, places)
    return rankings


def _rank(totals: Tensor, places: int) -> Tensor:
    values, classes = totals.sort(dim=1, descending=True, stable=True)
    ranked = classes.masked_fill(values <= 0, -1)[:, :places]
    return F.pad(ranked, (0, places - ranked.shape[1]), value=-1)

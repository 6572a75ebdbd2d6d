"""Rankings by cosine, and their average precision by the rule of ROxford5k and RParis6k."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from evals.core.features import to_unit

# Letters: Q queries, N images of the database, C summary width.

_DECIMALS = 10  # of float64 similarities: far above their rounding
_ROWS = 8192  # of the database at once in float64


class Scores(NamedTuple):
    """Scores of each query from 0 to 1, float64; NaN for a query without a positive."""

    ap: Tensor  # [Q], average precision
    precision: dict[int, Tensor]  # [Q] each, by the number of images that are looked at


def rank(queries: Tensor, database: Tensor) -> Tensor:
    """Rank all images by their cosine with each query, the nearest first: [Q, C], [N, C] -> [Q, N].

    In float64; of equally near images the first comes first. Average precision needs the place of every
    positive, so all images are sorted: FAISS finds the nearest few, and would have to be asked for all.
    """
    unit = to_unit(queries).double()
    cosines = torch.cat([unit @ to_unit(part).double().T for part in database.split(_ROWS)], dim=1)
    return cosines.round(decimals=_DECIMALS).argsort(dim=1, descending=True, stable=True)


def score_ranking(ranking: Tensor, positive: Tensor, junk: Tensor, ks: Sequence[int]) -> Scores:
    """Score rankings as F. Radenovic et al. 2018 do; images that are junk are taken out first.

    The average precision is the area under precision over recall by trapezoids: at each positive, the mean of
    the precision before it and after it. The precision at k looks at no more images than up to the last
    positive.

    Args:
        ranking: [Q, N] images, the nearest first.
        positive: [Q, N] bool, by image.
        junk: [Q, N] bool, by image; none of them positive.
        ks: numbers of images that are looked at.
    """
    hit, kept = positive.gather(1, ranking), ~junk.gather(1, ranking)
    place = kept.cumsum(1).double()  # from 1, among those that are kept
    found = hit.cumsum(1).double()
    count = found[:, -1]
    after = found / place.clamp(min=1)
    before = ((found - 1) / (place - 1).clamp(min=1)).where(place > 1, 1.0)
    ap = ((before + after) / 2 * hit).sum(1) / count  # 0 / 0 without a positive
    last = (place * hit).amax(1)
    precision = {}
    for k in ks:
        seen = last.clamp(max=k)
        precision[k] = (hit & (place <= seen.unsqueeze(1))).sum(1) / seen
    return Scores(ap, precision)


@lru_cache(maxsize=4096)
def chance(count: int, num_positive: int) -> float:
    """Compute the expected average precision, as in `score_ranking`, of a random order of `count` images."""
    if count == 1:
        return 1.0
    place = torch.arange(1, count + 1, dtype=torch.float64)
    others = (num_positive - 1) / (count - 1)  # the expected share of positives before a positive
    after = (1 + (place - 1) * others) / place
    before = torch.full_like(place, others)
    before[0] = 1.0
    return float((before + after).mean() / 2)

"""From unit vectors to ranks, in blocks, so that memory does not grow with the data.

Products are taken in float64 and rounded far below the noise of float32 features: equal vectors then tie
exactly, ties go to the lower place, and no rank depends on the size of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Letters: N pictures, K classes, M captions, E width, b rows of a block.

_DECIMALS = 10
_TINY = 1e-300  # below the length of every vector of float32 that is not zero
_CELLS = 1 << 23  # float64 products at once


class Ranking(NamedTuple):
    """The five best classes of each picture; where there are fewer, -1 and -inf."""

    classes: Tensor  # [N, 5] int64
    cosines: Tensor  # [N, 5] float64


def rank_classes(pictures: Tensor, classifier: Tensor, places: int = 5) -> Ranking:
    """The classes nearest to each picture.

    Args:
        pictures: [N, E], of any length; normalised here.
        classifier: [E, K] unit columns.
    """
    columns = classifier.double()
    kept = min(places, columns.shape[1])
    parts = []
    for block in F.normalize(pictures.double(), dim=1, eps=_TINY).split(_rows(columns.shape[1])):
        values, classes = _round(block @ columns).sort(dim=1, descending=True, stable=True)
        parts.append((values[:, :kept], classes[:, :kept]))
    missing = (0, places - kept)
    values, classes = (torch.cat(part) for part in zip(*parts, strict=True))
    return Ranking(F.pad(classes, missing, value=-1), F.pad(values, missing, value=-torch.inf))


def picture_to_text(pictures: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """[N] int64: how many captions stand before the best of each picture's own.

    Args:
        pictures: [N, E], of any length.
        texts: [M, E] unit vectors.
        owners: [M], each caption's picture; every picture has one or more.
    """
    rows = F.normalize(pictures.double(), dim=1, eps=_TINY)
    columns = texts.double().T
    found = []
    for numbers in torch.arange(len(rows)).split(_rows(len(texts))):
        cosines = _round(rows[numbers] @ columns)  # [b, M]
        own = cosines.masked_fill(owners != numbers.unsqueeze(1), -torch.inf)
        best, place = own.max(dim=1, keepdim=True)
        found.append(_before(cosines, best, place))
    return torch.cat(found)


def text_to_picture(pictures: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """[M] int64: how many pictures stand before each caption's own. Arguments as `picture_to_text`."""
    columns = F.normalize(pictures.double(), dim=1, eps=_TINY).T
    found = []
    for numbers in torch.arange(len(texts)).split(_rows(len(pictures))):
        cosines = _round(texts[numbers].double() @ columns)  # [b, N]
        place = owners[numbers].unsqueeze(1)
        found.append(_before(cosines, cosines.gather(1, place), place))
    return torch.cat(found)


def _before(cosines: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """[b]: the entries of each row above `value` [b, 1], and equal ones left of `place` [b, 1]."""
    columns = torch.arange(cosines.shape[1])
    return ((cosines > value) | ((cosines == value) & (columns < place))).sum(dim=1)


def _round(products: Tensor) -> Tensor:
    return products.round(decimals=_DECIMALS)


def _rows(width: int) -> int:
    return max(1, _CELLS // width)

"""Ranks from unit vectors, computed in blocks, so that memory does not grow with the data.

Products are computed in float64 and rounded far below the noise of float32 features: equal vectors then tie
exactly, ties go to the lower index, and no rank depends on the block size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Letters: N images, K classes, M captions, E width, b rows of a block.

_DECIMALS = 10
_TINY = 1e-300  # below the length of every vector of float32 that is not zero
_CELLS = 1 << 23  # float64 products at once


class Ranking(NamedTuple):
    """The five best classes of each image, padded by -1 and -inf."""

    classes: Tensor  # [N, 5] int64
    cosines: Tensor  # [N, 5] float64


def rank_classes(images: Tensor, classifier: Tensor, places: int = 5) -> Ranking:
    """Rank the classes nearest to each image.

    Args:
        images: [N, E], of any length; normalised here.
        classifier: [E, K] unit columns.
    """
    columns = classifier.double()
    kept = min(places, columns.shape[1])
    parts = []
    for block in F.normalize(images.double(), dim=1, eps=_TINY).split(_rows(columns.shape[1])):
        values, classes = _round(block @ columns).sort(dim=1, descending=True, stable=True)
        parts.append((values[:, :kept], classes[:, :kept]))
    missing = (0, places - kept)
    values, classes = (torch.cat(part) for part in zip(*parts, strict=True))
    return Ranking(F.pad(classes, missing, value=-1), F.pad(values, missing, value=-torch.inf))


def image_to_text(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Count the captions ranked before the best of each image's own, [N] int64.

    Args:
        images: [N, E], of any length.
        texts: [M, E] unit vectors.
        owners: [M], each caption's image; every image has one or more.
    """
    rows = F.normalize(images.double(), dim=1, eps=_TINY)
    columns = texts.double().T
    found = []
    for numbers in torch.arange(len(rows)).split(_rows(len(texts))):
        cosines = _round(rows[numbers] @ columns)  # [b, M]
        own = cosines.masked_fill(owners != numbers.unsqueeze(1), -torch.inf)
        best, place = own.max(dim=1, keepdim=True)
        found.append(_before(cosines, best, place))
    return torch.cat(found)


def text_to_image(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Count the images ranked before each caption's own, [M] int64; arguments as in `image_to_text`."""
    columns = F.normalize(images.double(), dim=1, eps=_TINY).T
    found = []
    for numbers in torch.arange(len(texts)).split(_rows(len(images))):
        cosines = _round(texts[numbers].double() @ columns)  # [b, N]
        place = owners[numbers].unsqueeze(1)
        found.append(_before(cosines, cosines.gather(1, place), place))
    return torch.cat(found)


def _before(cosines: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """Count the entries of each row above `value` [b, 1], and equal ones left of `place` [b, 1]: [b]."""
    columns = torch.arange(cosines.shape[1])
    return ((cosines > value) | ((cosines == value) & (columns < place))).sum(dim=1)


def _round(products: Tensor) -> Tensor:
    return products.round(decimals=_DECIMALS)


def _rows(width: int) -> int:
    return max(1, _CELLS // width)

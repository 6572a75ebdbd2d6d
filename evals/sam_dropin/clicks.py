"""Simulated clicks: the point of an error region that is farthest from its edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio.errors import require

# Letters: N instances, H W pixels.

_APART = 1e6  # pixels between two instances' planes, so that they do not affect each other


def next_clicks(truth: Tensor, predictions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the next click on each of N objects: points [N, 2] as x y, labels [N], 1 on the object, else 0.

    The click is placed in the larger error, the missed pixels or the surplus pixels (the missed ones if both
    are equal), at the point farthest from the region's edge, the first of equally far ones in reading order.
    An object without an error is clicked in its centre. Without predictions the whole object is missed.

    Args:
        truth: bool [N, H, W].
        predictions: bool [N, H, W], or None before the first click.
    """
    missed = truth if predictions is None else truth & ~predictions
    surplus = torch.zeros_like(truth) if predictions is None else predictions & ~truth
    more = torch.count_nonzero(missed.flatten(1), dim=1) >= torch.count_nonzero(surplus.flatten(1), dim=1)
    region = torch.where(more[:, None, None], missed, surplus)
    nothing = ~region.flatten(1).any(dim=1)
    region[nothing] = truth[nothing]
    depths = _depths(region.cpu().numpy())
    places = torch.from_numpy(depths.reshape(len(depths), -1).argmax(axis=1))
    width = truth.shape[2]
    points = torch.stack((places % width, places // width), dim=1).double()
    return points, more.cpu().long()


def _depths(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Compute each mask pixel's distance to the nearest outside pixel, [N, H, W], in one call for all."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    morphology: Any = require("scipy.ndimage", extra="sam")
    found = morphology.distance_transform_edt(padded, sampling=(_APART, 1.0, 1.0))
    kept: NDArray[np.float32] = found[:, 1:-1, 1:-1].astype(np.float32)
    return kept

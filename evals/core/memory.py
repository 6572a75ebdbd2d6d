"""Reject batches that cannot fit into memory, with the sizes, before any work."""

from __future__ import annotations

import torch

from radio.errors import SizeError
from radio.memory import memory_of
from radio.types import Backbone

_LEAST_PATCH = 8  # pixels, for a backbone that accepts any size


def check_memory(
    model: Backbone, batch: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Check that the images of a batch and their tokens fit into memory; activations are not counted.

    Raises:
        SizeError: they do not; the message has the sizes.
    """
    height, width = size
    patch_height, patch_width = (max(side, _LEAST_PATCH) for side in model.nearest_size(1, 1))
    rows, columns = max(height // patch_height, 1), max(width // patch_width, 1)
    need = batch * dtype.itemsize * (3 * height * width + rows * columns * model.token_dim)
    there = memory_of(device)
    if need > there:
        raise SizeError(
            f"{batch} images of {height}x{width} px and their tokens take {need / 1e9:,.1f} GB, and {device} "
            f"has {there / 1e9:,.1f}; make the images or the batch smaller"
        )

"""What cannot fit into memory is refused with the numbers, before any work."""

from __future__ import annotations

import torch

from radio.errors import SizeError
from radio.memory import memory_of
from radio.types import Backbone

_LEAST_PATCH = 8  # pixels, where a backbone takes any size


def check_memory(
    model: Backbone, batch: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """None, when the images of a batch and their tokens are less than the memory; all between comes on top.

    Raises:
        SizeError: they are more; says how much.
    """
    height, width = size
    patch_height, patch_width = (max(side, _LEAST_PATCH) for side in model.fit(1, 1))
    rows, columns = max(height // patch_height, 1), max(width // patch_width, 1)
    need = batch * dtype.itemsize * (3 * height * width + rows * columns * model.token_dim)
    there = memory_of(device)
    if need > there:
        raise SizeError(
            f"{batch} images of {height}x{width} px and their tokens take {need / 1e9:,.1f} GB, and {device} "
            f"has {there / 1e9:,.1f}; make the images or the batch smaller"
        )

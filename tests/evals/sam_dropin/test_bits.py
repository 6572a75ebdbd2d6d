"""Masks as bits against numpy, and erosion against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from evals.sam_dropin.masks import count, erode, pack


def some_masks(height: int, width: int, share: float) -> torch.Tensor:
    return torch.rand(4, height, width, generator=torch.Generator().manual_seed(height)) < share


@pytest.mark.parametrize("size", [(1, 1), (8, 3), (13, 9), (64, 50)])
def test_bits_are_numpys_and_are_counted(size: tuple[int, int]) -> None:
    masks = some_masks(*size, 0.5)
    masks[0] = True
    packed = pack(masks)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(masks.numpy(), axis=1, bitorder="little"))
    assert count(packed).tolist() == masks.sum((1, 2)).tolist()


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 7, 11, 16])
@pytest.mark.parametrize("size", [(13, 9), (40, 33), (64, 50)])
def test_erosion_is_scipys(size: tuple[int, int], reach: int) -> None:
    """Down to nothing, where the square is larger than the image."""
    masks = some_masks(*size, 0.97)
    masks[0] = True
    theirs = [
        ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0)
        for mask in masks.numpy()
    ]
    assert torch.equal(erode(pack(masks), reach), pack(torch.from_numpy(np.stack(theirs))))

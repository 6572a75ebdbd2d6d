"""Bilinear resizing of one plane, pixel by pixel: the oracle of everything that resamples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Resize = Callable[[Tensor, tuple[int, int]], Tensor]


@pytest.fixture
def bilinear_by_loop() -> Resize:
    """A function [H, W, D], (h, w) -> [h, w, D]; pixel centres at halves, edges repeated."""

    def neighbours(index: int, size: int, to: int) -> tuple[int, int, float]:
        at = max((index + 0.5) * size / to - 0.5, 0.0)
        low = min(math.floor(at), size - 1)
        return low, min(low + 1, size - 1), at - low

    def resize(plane: Tensor, to: tuple[int, int]) -> Tensor:
        height, width, depth = plane.shape
        out = torch.empty(*to, depth, dtype=torch.float64)
        for i in range(to[0]):
            top, bottom, v = neighbours(i, height, to[0])
            for j in range(to[1]):
                left, right, u = neighbours(j, width, to[1])
                above = (1 - u) * plane[top, left].double() + u * plane[top, right].double()
                below = (1 - u) * plane[bottom, left].double() + u * plane[bottom, right].double()
                out[i, j] = (1 - v) * above + v * below
        return out.to(plane.dtype)

    return resize

"""All interpolation of images and feature maps in the package."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .types import Features

# Letters: B batch, T tokens, D width, H W grid.


def resize_images(
    images: Tensor, size: tuple[int, int], mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Resize images [B, 3, h, w] in [0, 1] to another (height, width), antialiased, clamped to [0, 1]."""
    if tuple(images.shape[-2:]) == size:
        return images
    resized = F.interpolate(images, size=size, mode=mode, antialias=True, align_corners=False)
    return resized.clamp_(0.0, 1.0)


def resize_tokens(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Resample tokens [B, T, D] bilinearly from one grid to another (paper §4), in float32."""
    if grid == to:
        return tokens
    plane = tokens.transpose(1, 2).unflatten(2, grid).float()
    plane = F.interpolate(plane, size=to, mode="bilinear", align_corners=False)
    return plane.flatten(2).transpose(1, 2).to(tokens.dtype)


def resize_features(features: Features, to: tuple[int, int]) -> Features:
    """Resample the tokens of features to another grid; the summary is unchanged."""
    return Features(features.summary, resize_tokens(features.tokens, features.grid, to), to)

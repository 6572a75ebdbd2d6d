"""Views of an image for an encoder: the centre crop, or the whole image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from radio.errors import DataError, SizeError
from radio.images import EVALUATION_RATIO, MAX_PIXELS, cover, evaluation_view, resize
from radio.types import Backbone

MAX_ASPECT = 32
"""Largest aspect ratio of a whole image; a longer strip would take gigabytes."""

ViewKind = Literal["center", "short-side"]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Preprocessing of an image into an encoder's input."""

    kind: ViewKind
    size: tuple[int, int]  # (height, width) of the crop; of the square to cover for short-side
    ratio: float  # resize to ratio * size before the crop; unused for short-side
    nearest_size: Callable[[int, int], tuple[int, int]]  # the backbone's own

    def __call__(self, image: Tensor) -> Tensor:
        """Convert a uint8 image [3, H, W] to the input, float [3, h, w] in [0, 1].

        Raises:
            DataError: its aspect ratio is above `MAX_ASPECT`.
        """
        if self.kind == "center":
            return evaluation_view(image, self.size, self.ratio)
        height, width = image.shape[-2:]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise DataError(
                f"{height}x{width} (height x width) is over {MAX_ASPECT} times as long as wide; "
                f"crop it, or take --view center"
            )
        height, width = cover(height, width, self.size)
        return resize(image, self.nearest_size(height, width))

    def describe(self) -> str:
        """Describe everything that determines the input, for cache keys and reports."""
        size = f"{self.size[0]}x{self.size[1]}"
        if self.kind == "center":
            return f"resize to cover {self.ratio:.6g} x {size} bicubic antialiased, centre crop {size}"
        return f"short side to cover {size} bicubic antialiased, whole image, sides fitted to the backbone"


def make_view(
    model: Backbone, kind: ViewKind, size: int | None, ratio: float = EVALUATION_RATIO
) -> tuple[View, tuple[str, ...]]:
    """Create the view for a model, with notes.

    `size` is rounded to the nearest size that the model accepts (default: the model's own size).

    Raises:
        SizeError: a size below one pixel, or one of more than `MAX_PIXELS`.
    """
    if size is not None and size < 1:
        raise SizeError(f"a size of {size} px holds no image; give the side in pixels, such as 224")
    fitted = model.native_size if size is None else model.nearest_size(size, size)
    resized = [side if kind == "short-side" else round(ratio * side) for side in fitted]
    if math.prod(resized) > MAX_PIXELS:
        raise SizeError(
            f"images of {fitted[0]}x{fitted[1]} px are cut out of {resized[0]}x{resized[1]}; the limit is "
            f"{MAX_PIXELS / 1e6:.0f} million pixels; give a smaller --size or --ratio"
        )
    view = View(kind=kind, size=fitted, ratio=ratio, nearest_size=model.nearest_size)
    if size is None or fitted == (size, size):
        return view, ()
    return view, (f"{size} px was asked for; {model.name} takes {fitted[0]}x{fitted[1]}, which was used",)

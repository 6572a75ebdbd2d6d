"""What an encoder is shown of a picture: the middle square, or all of it."""

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
"""With its aspect kept, an image longer than this times its width would be a strip of gigabytes."""

ViewKind = Literal["center", "short-side"]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How a picture becomes an input."""

    kind: ViewKind
    size: tuple[int, int]  # (height, width) of the crop; of the square to cover for short-side
    ratio: float  # resize to ratio * size before the crop; unused for short-side
    fit: Callable[[int, int], tuple[int, int]]  # the backbone's own

    def __call__(self, image: Tensor) -> Tensor:
        """The input, float [3, h, w] in [0, 1], of a uint8 picture [3, H, W].

        Raises:
            DataError: it is too long and narrow to be resized.
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
        return resize(image, self.fit(height, width))

    def describe(self) -> str:
        """All that decides the input, for cache keys and reports."""
        size = f"{self.size[0]}x{self.size[1]}"
        if self.kind == "center":
            return f"resize to cover {self.ratio:.6g} x {size} bicubic antialiased, centre crop {size}"
        return f"short side to cover {size} bicubic antialiased, whole picture, sides fitted to the backbone"


def make_view(
    model: Backbone, kind: ViewKind, size: int | None, ratio: float = EVALUATION_RATIO
) -> tuple[View, tuple[str, ...]]:
    """The view for a model and notes on it: `size` None takes the model's own, else the nearest it accepts.

    Raises:
        SizeError: a size below one pixel, or one of more than `MAX_PIXELS`.
    """
    if size is not None and size < 1:
        raise SizeError(f"a size of {size} px holds no picture; give the side in pixels, such as 224")
    fitted = model.native_size if size is None else model.fit(size, size)
    resized = [side if kind == "short-side" else round(ratio * side) for side in fitted]
    if math.prod(resized) > MAX_PIXELS:
        raise SizeError(
            f"images of {fitted[0]}x{fitted[1]} px are cut out of {resized[0]}x{resized[1]}; the limit is "
            f"{MAX_PIXELS / 1e6:.0f} million pixels; give a smaller --size or --ratio"
        )
    view = View(kind=kind, size=fitted, ratio=ratio, fit=model.fit)
    if size is None or fitted == (size, size):
        return view, ()
    return view, (f"{size} px was asked for; {model.name} takes {fitted[0]}x{fitted[1]}, which was used",)

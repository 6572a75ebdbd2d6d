"""The input sizes of the backbone, computed before the training from the images of the data set."""

from __future__ import annotations

from collections.abc import Iterable

from radio.errors import SizeError
from radio.types import Backbone

from .presets import ProbeConfig, Size


def keep_ratio(size: Size, long_side: int, short_side: int) -> Size:
    """Compute the size after MMSegmentation's keep-ratio resize: the largest in both limits, halves up."""
    height, width = size
    scale = min(long_side / max(size), short_side / min(size))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def padded(size: Size, crop: Size) -> Size:
    """Pad a size to at least the crop: the padding is black, below and to the right, and is not scored.

    Only images more than `long_side / crop` times as long as wide need it.
    """
    return max(size[0], crop[0]), max(size[1], crop[1])


def slide_crops(size: Size, crop: Size, stride: Size) -> tuple[tuple[int, int, int, int], ...]:
    """List (top, left, bottom, right) of every crop of MMSegmentation's slide mode, in its order.

    The last crop of a row or column is moved back into the image. A side shorter than the crop gives a
    shorter crop, which is why images are padded first.
    """
    rows, columns = (_ends(size[side], crop[side], stride[side]) for side in (0, 1))
    return tuple((top, left, bottom, right) for top, bottom in rows for left, right in columns)


def shown_sizes(sizes: Iterable[Size], config: ProbeConfig, model: Backbone) -> set[Size]:
    """Collect all input sizes of the backbone: in testing on images of these sizes, and in training."""
    shown = {config.crop}
    if config.resize == "stretch":
        return shown
    for size in set(sizes):
        resized = keep_ratio(size, config.long_side, config.short_side)
        if config.stride is None:
            shown.add(model.nearest_size(*resized))
            continue
        crops = slide_crops(padded(resized, config.crop), config.crop, config.stride)
        shown.update((bottom - top, right - left) for top, left, bottom, right in crops)
    return shown


def check_sizes(sizes: Iterable[Size], config: ProbeConfig, model: Backbone) -> None:
    """Check that the backbone takes all its input sizes.

    Raises:
        SizeError: it does not take one; names that size and the nearest one that it takes.
    """
    for size in sorted(shown_sizes(sizes, config, model)):
        fitted = model.nearest_size(*size)
        if fitted != size:
            raise SizeError(
                f"testing would show {model.name} {size[0]}x{size[1]} px, which it does not take "
                f"(the nearest is {fitted[0]}x{fitted[1]}); choose --crop {min(fitted)}"
            )


def _ends(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """List (start, end) of the crops along one side."""
    steps = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(step * stride + crop, side) for step in range(steps)]
    return [(max(end - crop, 0), end) for end in ends]

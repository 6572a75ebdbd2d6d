"""Which sizes the backbone will be shown: computed before the training, from the pictures that are there."""

from __future__ import annotations

from collections.abc import Iterable

from radio.errors import SizeError
from radio.types import Backbone

from .presets import Plan, Size


def keep_ratio(size: Size, long_side: int, short_side: int) -> Size:
    """The size after MMSegmentation's keep-ratio resize: as large as both limits allow, halves rounded up."""
    height, width = size
    scale = min(long_side / max(size), short_side / min(size))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def padded(size: Size, crop: Size) -> Size:
    """At least the crop on both sides: what is missing is black below and to the right, and is not scored.

    Only pictures more than `long_side / crop` times as long as wide need it.
    """
    return max(size[0], crop[0]), max(size[1], crop[1])


def slide_crops(size: Size, crop: Size, stride: Size) -> tuple[tuple[int, int, int, int], ...]:
    """(top, left, bottom, right) of every crop that MMSegmentation's slide mode cuts, in its order.

    The last crop of a row or column is moved back into the picture. A side shorter than the crop gives a
    shorter crop, which is why pictures are padded first.
    """
    rows, columns = (_ends(size[side], crop[side], stride[side]) for side in (0, 1))
    return tuple((top, left, bottom, right) for top, bottom in rows for left, right in columns)


def shown_sizes(sizes: Iterable[Size], plan: Plan, model: Backbone) -> set[Size]:
    """Every size that testing shows the backbone for pictures of these sizes, and that of training."""
    shown = {plan.crop}
    if plan.resize == "stretch":
        return shown
    for size in set(sizes):
        resized = keep_ratio(size, plan.long_side, plan.short_side)
        if plan.stride is None:
            shown.add(model.fit(*resized))
            continue
        crops = slide_crops(padded(resized, plan.crop), plan.crop, plan.stride)
        shown.update((bottom - top, right - left) for top, left, bottom, right in crops)
    return shown


def check_sizes(sizes: Iterable[Size], plan: Plan, model: Backbone) -> None:
    """Make sure that the backbone takes everything it will be shown.

    Raises:
        SizeError: it does not; names the size and the nearest one that it takes.
    """
    for size in sorted(shown_sizes(sizes, plan, model)):
        fitted = model.fit(*size)
        if fitted != size:
            raise SizeError(
                f"testing would show {model.name} {size[0]}x{size[1]} px, which it does not take "
                f"(the nearest is {fitted[0]}x{fitted[1]}); choose --crop {min(fitted)}"
            )


def _ends(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """(start, end) along one side."""
    steps = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(step * stride + crop, side) for step in range(steps)]
    return [(max(end - crop, 0), end) for end in ends]

"""What a report shows on the page, as plain data: curves, bars, tables, confusions, examples and images.

The page draws blocks of one title from several models' reports together: one plot with a line per model, one
table with a column per model. Texts are plain; whoever renders them escapes them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from pydantic import Field

from radio.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

# Letters: H W pixels.

Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # the range that figures can show
_QUALITY = 78  # of WebP


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image file of a report."""

    file: str  # relative to the report's folder
    alt: str
    label: str = ""  # text beside it
    good: bool | None = None  # whether it shows something right, where that applies
    side: Annotated[int, Field(ge=1, le=4096)] = 96  # its longer side on the page in pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """One model's line of a plot, with its 95 % interval."""

    title: str
    x_label: str
    y_label: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    low: tuple[Number | None, ...] = ()
    high: tuple[Number | None, ...] = ()
    log_x: bool = False
    caption: str = ""
    kind: Literal["lines"] = "lines"

    def __post_init__(self) -> None:
        """Check that all points have both coordinates."""
        _check_lengths(self.title, len(self.x), self.y, self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """One model's bars, with 95 % intervals."""

    title: str
    x_label: str
    names: tuple[str, ...]
    values: tuple[Number | None, ...]
    low: tuple[Number | None, ...] = ()
    high: tuple[Number | None, ...] = ()
    caption: str = ""
    kind: Literal["bars"] = "bars"

    def __post_init__(self) -> None:
        """Check that all bars have a name."""
        _check_lengths(self.title, len(self.names), self.values, self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows under named columns, such as the accuracy of each class.

    Where `compared` names a column, several models' tables become one: the rows by their first cell, the
    compared values side by side, the lowest of the first model on top.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    compared: str = ""
    shared: str = ""  # a column with the same values for all models, such as a count of instances
    unit: str = "%"  # of the compared column
    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        """Check that every row has as many cells as the table has columns, and that those named exist."""
        wrong = next((index for index, row in enumerate(self.rows) if len(row) != len(self.columns)), None)
        if wrong is not None:
            raise DataError(
                f"row {wrong} of a table has {len(self.rows[wrong])} cells under {len(self.columns)} columns"
            )
        unknown = {self.compared, self.shared} - {"", *self.columns}
        if unknown:
            raise DataError(f"table {self.title!r} has no column {min(unknown)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Confusions:
    """How often each class was taken for another, the most frequent first."""

    title: str
    rows: tuple[tuple[str, str, int], ...]  # class, prediction, count
    kind: Literal["confusions"] = "confusions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sample: its image (or none), lines of text about it, and other images beside it."""

    image: Image | None
    lines: tuple[str, ...]
    others: tuple[Image, ...] = ()
    good: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """A model's predictions for single samples."""

    title: str
    examples: tuple[Example, ...]
    kind: Literal["examples"] = "examples"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """Images beside one another."""

    images: tuple[Image, ...]
    name: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageGrid:
    """Rows of images below one another."""

    title: str
    rows: tuple[ImageRow, ...]
    kind: Literal["images"] = "images"


Block = Annotated[Lines | Bars | Table | Confusions | Examples | ImageGrid, Field(discriminator="kind")]


def encode_image(pixels: Tensor | NDArray[np.uint8], *, side: int, exact: bool = False) -> bytes:
    """Encode an image, uint8 [H, W, 3] or a tensor [3, H, W], as WebP, or as PNG if `exact`.

    Args:
        side: the longer side in pixels, at most; larger images are reduced.
        exact: keep every pixel.
    """
    array = pixels if isinstance(pixels, np.ndarray) else pixels.permute(1, 2, 0).numpy()
    image = PillowImage.fromarray(np.ascontiguousarray(array))
    if max(image.size) > side:
        image.thumbnail((side, side), PillowImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def _check_lengths(
    title: str, count: int, values: tuple[object, ...], *intervals: tuple[object, ...]
) -> None:
    if len(values) != count or any(bounds and len(bounds) != count for bounds in intervals):
        raise DataError(f"{title!r} has {count} names or places and {len(values)} values, or other bounds")

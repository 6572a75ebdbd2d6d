"""The parts that a page is made of. Texts are plain; the templates escape them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from evals.core.blocks import Example, Image, ImageRow, encode_image
from evals.core.report import Metric, metric_text
from radio.errors import DataError, shown
from radio.images import decode
from radio.io import read_bytes

_MAX_IMAGE_BYTES = 256 << 20
_TYPES = {b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}  # by the first bytes; others are encoded again


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell: its text, small text under it, and its sort key (default: the text)."""

    text: str = ""
    order: float | str | None = None
    small: str = ""
    strong: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column's head; numbers are right-aligned and sorted in descending order first."""

    name: str
    small: str = ""
    numeric: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table; the first cell of each row is its head. Sorting moves `rows` and leaves `fixed` below."""

    kind: ClassVar[str] = "grid"

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    fixed: tuple[tuple[Cell, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plots:
    """Plots with one legend."""

    kind: ClassVar[str] = "plots"

    caption: str
    panels: tuple[tuple[str, str], ...]  # titles, and SVGs made by `figures`
    legend: tuple[tuple[str, int], ...] = ()  # names and colors


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail(Image):
    """An image inside the page."""

    src: str
    width: int
    height: int
    crisp: bool  # enlarged pixel by pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleList:
    """A model's predictions for single samples; their images are thumbnails."""

    kind: ClassVar[str] = "examples"

    caption: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strips:
    """Rows of thumbnails below one another; one with a name scrolls, one without wraps."""

    kind: ClassVar[str] = "strips"

    caption: str
    strips: tuple[ImageRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """Remarks that a reader should see."""

    kind: ClassVar[str] = "notes"

    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Collapsible:
    """Elements that open on demand."""

    kind: ClassVar[str] = "collapsible"

    summary: str
    elements: tuple[Element, ...]


Element = Grid | Plots | ExampleList | Strips | Notes | Collapsible


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with an entry in its table of contents."""

    anchor: str
    title: str
    elements: tuple[Element, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The content that the template renders; the first section is the overview."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


Row = Sequence[Cell | str | int | float | None]


def grid(
    caption: str,
    columns: Sequence[str | tuple[str, str]],
    rows: Sequence[Row],
    fixed: Sequence[Row] = (),
    *,
    digits: int = 1,
) -> Grid:
    """Build a table from plain values; a column with a number in it is a column of numbers.

    Args:
        columns: their names, or their names and small texts below.
        fixed: rows that stay below the others.
        digits: after the decimal point, for numbers that are not whole.
    """
    body, below = ([tuple(_cell(value, digits) for value in row) for row in part] for part in (rows, fixed))
    heads = [(column, "") if isinstance(column, str) else column for column in columns]
    numeric = [
        any(isinstance(row[i].order, (int, float)) for row in (*body, *below)) for i in range(len(heads))
    ]
    return Grid(
        caption=caption,
        columns=tuple(
            Column(name=name, small=small, numeric=is_number)
            for (name, small), is_number in zip(heads, numeric, strict=True)
        ),
        rows=tuple(body),
        fixed=tuple(below),
    )


def _cell(value: Cell | str | int | float | None, digits: int) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None or isinstance(value, str):
        return Cell(text=value or "")
    if isinstance(value, float) and not value.is_integer():
        return Cell(text=f"{value:.{digits}f}", order=value)
    return Cell(text=f"{value:g}" if abs(value) < 1e6 else str(value), order=value)


def notes(texts: Sequence[str]) -> tuple[Element, ...]:
    """Build an element of remarks, each once; empty without any."""
    return (Notes(texts=tuple(dict.fromkeys(texts))),) if texts else ()


def metric_cells(metrics: Sequence[Metric | None]) -> list[Cell]:
    """Build a cell for each model's value of one metric, with half of its interval; the best is bold."""
    present = [metric for metric in metrics if metric is not None]
    values = {metric.value for metric in present}
    best = None
    if len(values) > 1 and present[0].higher_is_better is not None:
        best = max(values) if present[0].higher_is_better else min(values)
    return [
        Cell()
        if metric is None
        else Cell(text=metric_text(metric), order=metric.value, strong=metric.value == best)
        for metric in metrics
    ]


@final
class ImageBudget:
    """Embeds images as long as their bytes stay within the page's budget."""

    def __init__(self, most_bytes: int = 2_000_000) -> None:
        self._left = most_bytes
        self.left_out = 0

    def embed(self, folder: Path, image: Image) -> Thumbnail | None:
        """Embed an image of a report; None where it exceeds the budget.

        A file that is far larger than it is shown, or of another format than PNG or WebP, is encoded again.

        Args:
            folder: of the report.

        Raises:
            DataError: the file does not exist, lies outside the folder, or is no image.
        """
        data = _read_image(folder, image.file)
        try:
            pixels = decode(data)
        except DataError as error:
            raise DataError(f"{shown(image.file)}: {error}") from error
        longest = max(pixels.shape[1:])
        kind = next((kind for start, kind in _TYPES.items() if data.startswith(start)), None)
        if kind is None or longest > 2 * image.side:
            data, kind = encode_image(pixels, side=2 * image.side), "webp"
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        if len(source) > self._left:
            self.left_out += 1
            return None
        self._left -= len(source)
        height, width = (max(1, round(side * image.side / longest)) for side in pixels.shape[1:])
        return Thumbnail(
            **{name: getattr(image, name) for name in ("file", "alt", "label", "good", "side")},
            src=source,
            width=width,
            height=height,
            crisp=image.side > longest,
        )


def _read_image(folder: Path, name: str) -> bytes:
    path = file_inside(folder.resolve(), name)
    if path is None and ".." in name.split("/"):
        raise DataError(f"{shown(name)} is not inside the folder of its report, so it is not shown")
    if path is None:
        raise DataError(f"{shown(name)} is not there any more")
    return read_bytes(path, limit=_MAX_IMAGE_BYTES)


def file_inside(folder: Path, name: str) -> Path | None:
    """Find the regular file of that name inside a resolved folder; None where none exists."""
    try:
        path = (folder / name).resolve()
        return path if path.is_file() and path.is_relative_to(folder) else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
        return None

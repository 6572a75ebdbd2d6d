"""The parts that a page is made of. Texts are plain; the templates escape them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from evals.core.report import Metric
from evals.core.tables import cell as words


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
class LegendEntry:
    """An entry of a legend."""

    name: str
    color: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One SVG, made by `figures`."""

    title: str
    svg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plots:
    """Panels with one legend."""

    kind: ClassVar[str] = "plots"

    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[LegendEntry, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail:
    """An image inside the page."""

    src: str
    alt: str
    width: int
    height: int
    label: str = ""
    good: bool | None = None
    crisp: bool = False  # enlarged pixel by pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Images one after the other."""

    kind: ClassVar[str] = "gallery"

    caption: str
    images: tuple[Thumbnail, ...]
    wide: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One image (or none), lines of text about it, and other images beside it."""

    image: Thumbnail | None
    lines: tuple[str, ...]
    others: tuple[Thumbnail, ...] = ()
    good: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """A model's predictions for single samples."""

    kind: ClassVar[str] = "examples"

    caption: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """A row of images with its head: a model's maps."""

    name: str
    note: str
    images: tuple[Thumbnail, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strips:
    """Rows of images below one another, aligned."""

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
    """Blocks that open on demand."""

    kind: ClassVar[str] = "folded"

    summary: str
    blocks: tuple[Block, ...]
    open: bool = False


Block = Grid | Plots | Gallery | Examples | Strips | Notes | Collapsible


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with an entry in its table of contents."""

    anchor: str
    title: str
    intro: str = ""
    blocks: tuple[Block, ...] = field(default=())


def notes(texts: Sequence[str]) -> tuple[Block, ...]:
    """Build a block of remarks, each once; empty without any."""
    return (Notes(texts=tuple(dict.fromkeys(texts))),) if texts else ()


def metric_cell(metric: Metric | None, *, best: float | None = None, small: str = "") -> Cell:
    """Build a cell of a value with half of its interval; bold where it is the best."""
    if metric is None:
        return Cell()
    return Cell(
        text=words(metric), order=metric.value, small=small, strong=best is not None and metric.value == best
    )


def best_of(metrics: Sequence[Metric | None]) -> float | None:
    """Return the best value; None where fewer than two different values exist."""
    there = [metric for metric in metrics if metric is not None]
    if len({metric.value for metric in there}) < 2:
        return None
    choose = max if there[0].higher_is_better else min
    return choose(metric.value for metric in there)

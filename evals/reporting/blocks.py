"""What a page is made of. Texts are plain; the templates escape them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from evals.core.report import Metric
from evals.core.tables import cell as words


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell: its text, small words under it, and what it is sorted by (the text unless given)."""

    text: str = ""
    order: float | str | None = None
    small: str = ""
    strong: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column's head; numbers stand to the right and are sorted downwards first."""

    name: str
    small: str = ""
    numeric: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table whose first cell of a row is the row's head. Sorting moves `rows` and leaves `fixed` below."""

    kind: ClassVar[str] = "grid"

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    fixed: tuple[tuple[Cell, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An entry of a legend."""

    name: str
    slot: int


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
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image inside the page."""

    src: str
    alt: str
    width: int
    height: int
    words: str = ""
    good: bool | None = None
    crisp: bool = False  # enlarged pixel by pixel


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Pictures one after the other."""

    kind: ClassVar[str] = "gallery"

    caption: str
    pictures: tuple[Picture, ...]
    wide: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One picture (or none), what is said of it in lines, and other pictures beside it."""

    picture: Picture | None
    lines: tuple[str, ...]
    others: tuple[Picture, ...] = ()
    good: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What a model did with single samples."""

    kind: ClassVar[str] = "examples"

    caption: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """A row of pictures with its head: a model's maps."""

    name: str
    note: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Strips:
    """Rows of pictures under one another, in step."""

    kind: ClassVar[str] = "strips"

    caption: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """Remarks that a reader should see."""

    kind: ClassVar[str] = "notes"

    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Folded:
    """Blocks that open on demand."""

    kind: ClassVar[str] = "folded"

    summary: str
    blocks: tuple[Block, ...]
    open: bool = False


Block = Grid | Plots | Gallery | Examples | Strips | Notes | Folded


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page with a place in its contents."""

    anchor: str
    title: str
    intro: str = ""
    blocks: tuple[Block, ...] = field(default=())


def notes(texts: Sequence[str]) -> tuple[Block, ...]:
    """A block of remarks, each once, or nothing where there are none."""
    return (Notes(texts=tuple(dict.fromkeys(texts))),) if texts else ()


def metric_cell(metric: Metric | None, *, best: float | None = None, small: str = "") -> Cell:
    """A value with half of its interval; strong where it is the best."""
    if metric is None:
        return Cell()
    return Cell(
        text=words(metric), order=metric.value, small=small, strong=best is not None and metric.value == best
    )


def best_of(metrics: Sequence[Metric | None]) -> float | None:
    """The best value, None where there are no two different ones to choose among."""
    there = [metric for metric in metrics if metric is not None]
    if len({metric.value for metric in there}) < 2:
        return None
    choose = max if there[0].higher_is_better else min
    return choose(metric.value for metric in there)

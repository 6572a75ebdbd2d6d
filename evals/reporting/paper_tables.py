"""Tables of runs, as a file beside reports and as a section of the page: the paper's, and those of claims."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from evals.core.report import Value
from radio.io import read_json

from .elements import Cell, Element, Plots, Section, grid, notes
from .figures import Series, lines, scatter

FORMAT: Literal["am-radio-tables/1"] = "am-radio-tables/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCell:
    """One number of a line: ours with half of its interval, and the paper's."""

    value: Value | None = None
    half: Value | None = None
    paper: Value | None = None

    @property
    def text(self) -> str:
        """Our number, such as `82.1 ±0.9`; empty where there is none."""
        if self.value is None:
            return ""
        if self.half is None:
            return number(self.value)
        return f"{self.value:.1f} ±{self.half:.1f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableLine:
    """A line: a model, how many of its seeds are done, and a cell per column."""

    label: str
    paper_label: str  # of the paper's line; empty where it has none
    seeds: str  # such as `3` or `2 of 3`; empty for a frozen teacher
    cells: tuple[TableCell, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableDifference:
    """Whether the paper's ordering of two lines, or what is claimed of them, holds in one column."""

    line: str
    against: str
    column: str
    value: Value
    low: Value | None
    high: Value | None
    paper: Value | None = None  # the paper's difference
    claim: str = ""  # where there is no paper's: higher, lower, or empty where nothing is claimed
    verdict: str  # empty where there is no interval

    @property
    def texts(self) -> tuple[str, ...]:
        """The cells below `MadeTable.verdict_head`."""
        known = self.low is not None and self.high is not None
        digits = 3 if self.column.endswith("loss") else 2
        between = f"{self.low:+.{digits}f} to {self.high:+.{digits}f}" if known else ""
        ours = f"{round(self.value, digits) + 0.0:+.{digits}f}"  # no -0.00
        wanted = self.claim if self.paper is None else f"{self.paper:+.{digits}f}"
        return (self.line, self.against, self.column, ours, between, wanted, self.verdict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCurve:
    """Columns of a table that are points of one curve per line."""

    title: str
    x_label: str
    x: tuple[Value, ...]
    columns: tuple[str, ...]  # one for each x


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeTable:
    """A table of the paper, made again, or one of claims."""

    name: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[TableLine, ...]
    differences: tuple[TableDifference, ...] = ()
    remarks: tuple[str, ...] = ()
    claims: bool = False  # its lines are compared with claims and not with the paper's numbers
    curves: tuple[TableCurve, ...] = ()

    @property
    def verdict_head(self) -> tuple[str, ...]:
        """The heads of the columns of `TableDifference.texts`."""
        ours, wanted = ("difference", "claimed") if self.claims else ("ours", "paper")
        return ("model", "against", "column", ours, "95 %", wanted, "verdict")


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeTables:
    """The tables that `radio-train tables --collect` wrote."""

    tables: tuple[MadeTable, ...]
    format: Literal["am-radio-tables/1"] = FORMAT

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


_TRADEOFF = ("images/s", "k-NN")
_FEWEST = 4  # models whose quality is plotted against their speed

_FILE = TypeAdapter(MadeTables)


def number(value: float) -> str:
    """Format a number: scores with one decimal, losses with three digits, large ones without decimals."""
    size = abs(value)
    return f"{value:.3g}" if size < 1 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def read_tables(path: Path) -> MadeTables:
    """Read the file of made tables.

    Raises:
        DataError: no such file, or not one that `radio-train tables --collect` wrote.
    """
    return read_json(path, _FILE, strict=False)


def tables_section(made: MadeTables) -> Section:
    """Build the page's section of tables."""
    elements: list[Element] = []
    for table in made.tables:
        title = f"{table.name}: {table.title}"
        columns = [(column, "" if table.claims else "ours, and the paper's") for column in table.columns]
        theirs = "" if table.claims else "; the paper's in small, on its own data"
        elements.append(
            grid(
                f"{title}. Ours with half of a 95 % interval{theirs}.",
                ("model", "seeds", *columns),
                [
                    (
                        Cell(text=line.label, small=line.paper_label),
                        line.seeds,
                        *(_cell(cell) for cell in line.cells),
                    )
                    for line in table.lines
                ],
            )
        )
        if table.differences:
            question = "does what is claimed show" if table.claims else "does the paper's ordering hold"
            rows = [each.texts for each in table.differences]
            elements.append(grid(f"{title}: {question}?", table.verdict_head, rows))
        elements += [*_tradeoff(table), *_curves(table), *notes(list(table.remarks))]
    papers = all(not table.claims for table in made.tables)
    title = "the paper's tables made again" if papers else "tables of runs"
    return Section(anchor="paper-tables", title=title, elements=tuple(elements))


def _curves(table: MadeTable) -> list[Element]:
    """Plot the curves of the lines that have values."""
    panels, legend = [], dict[str, int]()
    for number, curve in enumerate(table.curves):
        places = [table.columns.index(column) for column in curve.columns]
        series = []
        for line in table.lines:
            cells = [line.cells[place] for place in places]
            if all(cell.value is None for cell in cells):
                continue
            series.append(
                Series(
                    name=line.label,
                    color=legend.setdefault(line.label, len(legend)),
                    x=curve.x,
                    y=tuple(cell.value for cell in cells),
                    low=tuple(_minus(cell, 1) for cell in cells),
                    high=tuple(_minus(cell, -1) for cell in cells),
                )
            )
        if series:
            name = f"{table.name}-curve-{number}"
            panels.append((curve.title, lines(series, name=name, x_label=curve.x_label, log_x=True)))
    caption = f"{table.name}: means over seeds with 95 % intervals."
    return [Plots(caption=caption, panels=tuple(panels), legend=tuple(legend.items()))] if panels else []


def _minus(cell: TableCell, sign: int) -> float | None:
    """Return a bound of a cell's interval."""
    return None if cell.value is None or cell.half is None else cell.value - sign * cell.half


def _tradeoff(table: MadeTable) -> list[Element]:
    """Plot k-NN over images a second, where a table has both for a few models."""
    places = [next((i for i, name in enumerate(table.columns) if name == each), None) for each in _TRADEOFF]
    if None in places:
        return []
    points: list[Series] = []
    for line in table.lines:
        speed, quality = (line.cells[place] for place in places if place is not None)
        if speed.value is not None and quality.value is not None:
            points.append(Series(name=line.label, color=len(points), x=(speed.value,), y=(quality.value,)))
    if len(points) < _FEWEST:
        return []
    x_label, y_label = _TRADEOFF
    svg = scatter(points, name=f"{table.name}-tradeoff", x_label=x_label, y_label=y_label)
    legend = tuple((point.name, point.color) for point in points)
    caption = f"{table.name}: quality against speed, measured side by side on one machine."
    return [Plots(caption=caption, panels=(("", svg),), legend=legend)]


def _cell(cell: TableCell) -> Cell:
    paper = "" if cell.paper is None else f"paper: {cell.paper:g}"
    return Cell(text=cell.text, order=cell.value, small=paper)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int]) -> str:
    """Format a markdown table; the columns of `numbers` are right-aligned."""
    rule = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows)) + "\n"

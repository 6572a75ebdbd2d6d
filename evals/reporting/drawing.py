"""Blocks of several models' reports, drawn together: one plot, table or list for the blocks of one title."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from evals.core.blocks import Bars, Confusions, Examples, Image, ImageGrid, Lines, Table
from evals.core.report import Report
from radio.errors import DataError

from .compare import StoredReport
from .elements import (
    Collapsible,
    Element,
    ExampleList,
    ImageBudget,
    Plots,
    Strips,
    Thumbnail,
    grid,
)
from .figures import Series, bars, lines

B = TypeVar("B")
Members = Sequence[tuple[StoredReport, B]]
"""The blocks of one title, and their reports."""

_MOST_ROWS = 100  # of a table
_MOST_BARS = 30
_MOST_CONFUSIONS = 15
_MOST_SHOWN = 24  # examples of a block, rows of images, or images of a row
_MOST_VALUE = 1e100  # larger numbers are not drawn
_BARS_CAPTION = "Bars for each model; thin lines, where there are any, are 95 % intervals."


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskReports:
    """The reports of one task, in the order of the models, and what is needed to draw them."""

    anchor: str  # unique in the page
    entries: tuple[StoredReport, ...]
    colors: Mapping[str, int]  # index of each model's color
    image_budget: ImageBudget
    warnings: list[str] = field(default_factory=list)  # filled while drawing

    @property
    def reports(self) -> tuple[Report, ...]:
        """The reports without their paths."""
        return tuple(entry.report for entry in self.entries)

    def draw(self) -> list[Element]:
        """Draw the blocks of all reports, in the order of their first appearance."""
        groups: dict[tuple[type, str], list[tuple[StoredReport, Any]]] = {}
        for entry in self.entries:
            for block in entry.report.blocks:
                groups.setdefault((type(block), block.title), []).append((entry, block))
        drawn: list[Element] = []
        for number, ((kind, title), members) in enumerate(groups.items()):
            for element in _DRAW[kind](self, f"{self.anchor}-{number}", title, members):
                last = drawn[-1] if drawn else None
                if isinstance(element, Plots) and isinstance(last, Plots) and last.caption == element.caption:
                    drawn[-1] = replace(last, panels=(*last.panels, *element.panels))
                else:
                    drawn.append(element)
        return drawn

    def plot(self, title: str, svg: str, caption: str) -> Plots:
        """Show a plot with a legend of all models."""
        legend = tuple((report.model, self.colors[report.model]) for report in self.reports)
        return Plots(caption=caption, panels=((title, svg),), legend=legend)

    def image(self, entry: StoredReport, image: Image | None) -> Thumbnail | None:
        """Embed an image of a report; None, with a warning where it cannot be read, or the page is full."""
        if image is None:
            return None
        try:
            return self.image_budget.embed(entry.path.parent, image)
        except DataError as error:
            self.warnings.append(f"{entry.report.model}: {error}")
            return None

    def images(self, entry: StoredReport, images: Sequence[Image]) -> tuple[Thumbnail, ...]:
        """Embed the images of a row; those that `image` does not embed are left out."""
        embedded = [self.image(entry, image) for image in images[:_MOST_SHOWN]]
        return tuple(image for image in embedded if image is not None)


def _draw_lines(task: TaskReports, name: str, title: str, members: Members[Lines]) -> Iterator[Element]:
    first = members[0][1]
    series = [
        Series(
            name=entry.report.model,
            color=task.colors[entry.report.model],
            x=block.x,
            y=block.y,
            low=block.low,
            high=block.high,
        )
        for entry, block in members
        if block.x
    ]
    if series:
        log_x = first.log_x and all(x > 0 for each in series for x in each.x)
        svg = lines(series, name=name, x_label=first.x_label, y_label=first.y_label, log_x=log_x)
        yield task.plot(title, svg, first.caption or "Thin lines, where there are any, are 95 % intervals.")


def _draw_bars(task: TaskReports, name: str, title: str, members: Members[Bars]) -> Iterator[Element]:
    first = members[0][1]
    names = list(dict.fromkeys(name for _, block in members for name in block.names))[:_MOST_BARS]
    series = []
    for entry, block in members:
        values, low, high = (
            dict(zip(block.names, column, strict=False)) for column in (block.values, block.low, block.high)
        )
        series.append(
            Series(
                name=entry.report.model,
                color=task.colors[entry.report.model],
                y=tuple(values.get(name) for name in names),
                low=tuple(low.get(name) for name in names),
                high=tuple(high.get(name) for name in names),
            )
        )
    if any(value is not None for each in series for value in each.y):
        svg = bars(names, series, name=name, x_label=first.x_label)
        yield task.plot(title, svg, first.caption or _BARS_CAPTION)


def _draw_tables(task: TaskReports, name: str, title: str, members: Members[Table]) -> Iterator[Element]:
    compared = [(entry, block) for entry, block in members if block.compared]
    columns = {entry.report.model: _column(block, block.compared) for entry, block in compared}
    columns = {model: column for model, column in columns.items() if column}
    if columns:
        yield from _draw_compared(task, name, title, compared[0][1], columns)
    for entry, table in members:
        if not table.compared:
            summary = f"{entry.report.model}: {title}" if title else entry.report.model
            caption = summary
            if len(table.rows) > _MOST_ROWS:
                caption += f": the first {_MOST_ROWS} of {len(table.rows)} rows"
            elements = (grid(caption, table.columns, table.rows[:_MOST_ROWS]),)
            yield Collapsible(summary=summary, elements=elements)


def _draw_compared(
    task: TaskReports, name: str, title: str, table: Table, columns: Mapping[str, Mapping[str, float]]
) -> Iterator[Element]:
    """Draw one table of all models, the lowest of the first on top, and bars of the lowest."""
    model, first = next(iter(columns.items()))
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    rows.sort(key=lambda row: (row not in first, first.get(row, 0.0)))
    lowest = rows[:_MOST_BARS]
    series = [
        Series(name=other, color=task.colors[other], y=tuple(column.get(row) for row in lowest))
        for other, column in columns.items()
    ]
    part = "lowest first" if len(lowest) == len(rows) else f"the {len(lowest)} lowest of {len(rows)}"
    label = f"{table.compared} ({table.unit})" if table.unit else table.compared
    svg = bars(lowest, series, name=name, x_label=label)
    yield task.plot(f"{title}, {part} (by {model})", svg, _BARS_CAPTION)
    shared = _column(table, table.shared) if table.shared else {}
    shown = rows[:_MOST_ROWS]
    caption = f"{title}: {label}."
    if len(shown) < len(rows):
        caption += f" The {len(shown)} lowest of {len(rows)}."
    combined = grid(
        caption,
        (table.columns[0], *([table.shared] if shared else []), *columns),
        [
            (row, *([shared.get(row)] if shared else []), *(column.get(row) for column in columns.values()))
            for row in shown
        ],
    )
    yield Collapsible(summary=title, elements=(combined,))


def _column(table: Table, name: str) -> dict[str, float]:
    """Return the numbers of a column by the first cell of their row."""
    place = table.columns.index(name)
    return {
        str(row[0]): float(value)
        for row in table.rows
        if isinstance(value := row[place], (int, float)) and abs(value) <= _MOST_VALUE
    }


def _draw_confusions(
    task: TaskReports, name: str, title: str, members: Members[Confusions]
) -> Iterator[Element]:
    counts = {
        entry.report.model: {(label, prediction): count for label, prediction, count in block.rows}
        for entry, block in members
    }
    model, first = next(((model, count) for model, count in counts.items() if count), ("", {}))
    if first:
        pairs = sorted(first, key=lambda pair: -first[pair])[:_MOST_CONFUSIONS]
        yield grid(
            f"{title}: the commonest of {model}, and how often each model makes them",
            ("class", "taken for", *counts),
            [(*pair, *(count.get(pair) for count in counts.values())) for pair in pairs],
        )


def _draw_examples(task: TaskReports, name: str, title: str, members: Members[Examples]) -> Iterator[Element]:
    for number, (entry, block) in enumerate(members):
        examples = tuple(
            replace(
                example,
                image=task.image(entry, example.image),
                others=task.images(entry, example.others),
            )
            for example in block.examples[:_MOST_SHOWN]
        )
        if examples:
            caption = f"{entry.report.model}: {title}{_part(examples, block.examples)}"
            yield _open_first(number, caption, ExampleList(caption=caption, examples=examples))


def _draw_images(task: TaskReports, name: str, title: str, members: Members[ImageGrid]) -> Iterator[Element]:
    for number, (entry, block) in enumerate(members):
        strips = [replace(row, images=task.images(entry, row.images)) for row in block.rows[:_MOST_SHOWN]]
        shown = tuple(strip for strip in strips if strip.images)
        if shown:
            caption = f"{entry.report.model}: {title}{_part(strips, block.rows)}"
            yield _open_first(number, caption, Strips(caption=caption, strips=shown))


def _part(shown: Sequence[object], every: Sequence[object]) -> str:
    """Say how much is shown, unless it is everything."""
    return f" (the first {len(shown)} of {len(every)})" if len(shown) < len(every) else ""


def _open_first(number: int, summary: str, element: Element) -> Element:
    """Collapse what is not the first model's."""
    return element if number == 0 else Collapsible(summary=summary, elements=(element,))


_DRAW: Mapping[type, Callable[[TaskReports, str, str, Any], Iterator[Element]]] = {
    Lines: _draw_lines,
    Bars: _draw_bars,
    Table: _draw_tables,
    Confusions: _draw_confusions,
    Examples: _draw_examples,
    ImageGrid: _draw_images,
}

"""One section of the page for each task: metrics, plots, and how the reports were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.core.paper import DATA, TASKS, rows_for
from evals.core.report import Metric, Report, Table

from .blocks import (
    Block,
    Cell,
    Collapsible,
    Column,
    Grid,
    LegendEntry,
    Panel,
    Plots,
    Section,
    best_of,
    metric_cell,
    notes,
)
from .figures import Series, bars
from .images import ImageBudget
from .overview import title_of
from .records import Entry

_MOST_ROWS = 100
_MOST_COLUMNS = 12  # metrics side by side
_MOST_SKIPPED = 10
_ALWAYS_FREE = frozenset({"cache", "device", "workers", "resolved"})  # for any task, also of other packages


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The reports of one task, in the order of the models, and what is needed to draw them."""

    task: str
    entries: tuple[Entry, ...]
    slots: Mapping[str, int]  # the colour index of each model name
    image_budget: ImageBudget

    @property
    def reports(self) -> tuple[Report, ...]:
        """The reports without their paths."""
        return tuple(entry.report for entry in self.entries)

    def legend(self) -> tuple[LegendEntry, ...]:
        """Return a legend entry for each model."""
        return tuple(LegendEntry(name=r.model, color=self.slots[r.model]) for r in self.reports)

    def series(self, report: Report, names: Sequence[str]) -> Series:
        """Return a report's metrics of these names as bars or points; None where it lacks one."""
        found = [report.metrics.get(name) for name in names]
        return Series(
            name=report.model,
            color=self.slots[report.model],
            y=tuple(None if metric is None else metric.value for metric in found),
            low=tuple(None if metric is None else metric.low for metric in found),
            high=tuple(None if metric is None else metric.high for metric in found),
        )


Builder = Callable[[Scored], tuple[list[Block], frozenset[str]]]
"""Builds a task's own blocks; returns them with the names of the reports' tables that they show."""


def section_of(scored: Scored, build: Builder | None) -> Section:
    """Build the section of a task."""
    own, shown = build(scored) if build is not None else ([], frozenset[str]())
    reports = scored.reports
    remarks = [f"{report.model}: {note}" for report in reports for note in report.notes]
    remarks += differences(reports)
    blocks: list[Block] = [metrics_grid(reports), *notes(remarks), *own, *rates(scored)]
    blocks += rest_of_tables(reports, shown)
    blocks += paper_table(scored.task)
    made = tuple(details(report) for report in reports)
    blocks.append(Collapsible(summary="how each report was made: settings, data, versions", blocks=made))
    return Section(anchor=f"task-{scored.task}", title=title_of(scored.task), blocks=tuple(blocks))


def metrics_grid(reports: Sequence[Report]) -> Grid:
    """Build a table of models by metrics; with many metrics, the metrics are the rows."""
    first = [report.primary_metric for report in reports]
    names = list(dict.fromkeys([*first, *(name for report in reports for name in report.metrics)]))
    columns: list[list[Metric | None]] = [[report.metrics.get(name) for report in reports] for name in names]
    best = [best_of(column) for column in columns]
    units = [next(metric.unit for metric in column if metric is not None) for column in columns]
    cells = [
        [metric_cell(metric, best=top) for metric in column]
        for column, top in zip(columns, best, strict=True)
    ]
    if len(names) <= _MOST_COLUMNS:
        heads = [Column(name=name, small=unit) for name, unit in zip(names, units, strict=True)]
        rows = [
            (Cell(text=report.model), *(column[place] for column in cells))
            for place, report in enumerate(reports)
        ]
    else:
        heads = [Column(name=report.model) for report in reports]
        rows = [
            (Cell(text=f"{name} ({unit})" if unit else name), *column)
            for name, unit, column in zip(names, units, cells, strict=True)
        ]
    corner = "model" if len(names) <= _MOST_COLUMNS else "metric"
    used = dict.fromkeys(f"{data.role} {data.name} ({data.count})" for r in reports for data in r.data)
    return Grid(
        caption=f"All metrics, on {'; '.join(used)}." if used else "All metrics.",
        columns=(Column(name=corner, numeric=False), *heads),
        rows=tuple(rows),
    )


def machine_settings(reports: Sequence[Report]) -> frozenset[str]:
    """Return the settings that may differ between these reports of one task, as each report declares them."""
    return _ALWAYS_FREE.union(*(report.machine_settings for report in reports))


def differences(reports: Sequence[Report]) -> list[str]:
    """List what makes the reports of one task incomparable: settings and data that differ."""
    found, free = [], machine_settings(reports)
    names = dict.fromkeys(name for report in reports for name in report.settings)
    for name in names:
        if name in free:
            continue
        values = dict.fromkeys(_words(report.settings.get(name)) for report in reports)
        if len(values) > 1:
            found.append(f"not made alike: {name} is {' or '.join(values)}")
    data = dict.fromkeys(
        "; ".join(f"{used.role} {used.name} ({used.count}, {used.fingerprint[:8]})" for used in report.data)
        for report in reports
    )
    if len(data) > 1:
        found.append(f"not made on the same data: {' | '.join(data)}")
    return found


def rates(scored: Scored) -> list[Block]:
    """Build bars of the metrics with a unit per second; empty without any."""
    units = {
        name: metric.unit
        for report in scored.reports
        for name, metric in report.metrics.items()
        if metric.unit.endswith("/s")
    }
    if not units:
        return []
    names = list(units)
    svg = bars(
        [name.removesuffix("_rate") for name in names],
        [scored.series(report, names) for report in scored.reports],
        name=f"{scored.task}-rates",
        x_label=" and ".join(dict.fromkeys(units.values())),
    )
    caption = "Speed, on the machine that each report names: compare within one run only."
    return [Plots(caption=caption, panels=(Panel(title="speed", svg=svg),), legend=scored.legend())]


def class_grid(
    reports: Sequence[Report], table: str, value: str, caption: str, *, count: str | None = None
) -> Grid | None:
    """Build a table of classes by models, the first model's lowest on top; None without such tables."""
    columns = {report.model: _column(report.tables.get(table), value) for report in reports}
    columns = {model: found for model, found in columns.items() if found}
    if not columns:
        return None
    first = next(iter(columns.values()))
    names = list(dict.fromkeys(name for found in columns.values() for name in found))
    names.sort(key=lambda name: _lowest_first(first.get(name)))
    counts = _column(next(r.tables[table] for r in reports if table in r.tables), count) if count else {}
    shown = names[:_MOST_ROWS]
    if len(shown) < len(names):
        caption += f" The {len(shown)} lowest of {len(names)}."
    heads = [Column(name="class", numeric=False), *([Column(name=count)] if count and counts else [])]
    rows = [
        (
            Cell(text=name),
            *([Cell(text=_number(counts.get(name)), order=counts.get(name))] if counts else []),
            *(Cell(text=_number(found.get(name)), order=found.get(name)) for found in columns.values()),
        )
        for name in shown
    ]
    return Grid(
        caption=caption, columns=(*heads, *(Column(name=model) for model in columns)), rows=tuple(rows)
    )


def rest_of_tables(reports: Sequence[Report], shown: frozenset[str]) -> list[Block]:
    """Build the reports' tables that none of the task's own blocks shows, collapsed."""
    found: list[Block] = []
    for report in reports:
        for name, table in report.tables.items():
            if name not in shown:
                summary = f"{report.model}: {name.replace('_', ' ')}"
                found.append(Collapsible(summary=summary, blocks=(plain_grid(table, summary),)))
    return [Collapsible(summary="more tables", blocks=tuple(found))] if found else []


def plain_grid(table: Table, caption: str) -> Grid:
    """Build a report's table as it is, with at most 100 rows."""
    kept = table.rows[:_MOST_ROWS]
    numeric = [
        any(isinstance(row[place], (int, float)) for row in kept if place < len(row))
        for place in range(len(table.columns))
    ]
    if len(kept) < len(table.rows):
        caption += f": the first {len(kept)} of {len(table.rows)} rows"
    return Grid(
        caption=caption,
        columns=tuple(
            Column(name=name, numeric=number) for name, number in zip(table.columns, numeric, strict=True)
        ),
        rows=tuple(tuple(Cell(text=_number(value), order=value) for value in row) for row in kept),
    )


def paper_table(task: str) -> list[Block]:
    """Build the paper's results for a task, collapsed; empty for tasks that it does not have."""
    names = TASKS.get(task, ())
    rows = rows_for(task)
    if not rows:
        return []
    names = (*names, "images_per_second")
    grid = Grid(
        caption="The paper's numbers, on its own data and machines: not measured by this program.",
        columns=(
            Column(name="model (paper)", numeric=False),
            Column(name="kind", numeric=False),
            *(Column(name=name.replace("_", " "), small=DATA[name]) for name in names),
            Column(name="source", numeric=False),
        ),
        rows=tuple(
            (
                Cell(text=row.model, small=row.remark),
                Cell(text=row.kind),
                *(Cell(text=_number(row.values.get(name), 2), order=row.values.get(name)) for name in names),
                Cell(text=row.source),
            )
            for row in rows
        ),
    )
    return [Collapsible(summary="what the paper reports", blocks=(grid,))]


def details(report: Report) -> Collapsible:
    """Build a table of everything that is needed to repeat a report."""
    rows = [
        ("weights", report.fingerprint or "none"),
        ("made", report.created),
        ("device", report.device),
        ("commit", report.git or "unknown"),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())),
        *((f"setting {name}", _words(value)) for name, value in _flat(report.settings)),
        *((f"version of {name}", value) for name, value in report.versions.items()),
    ]
    for used in report.data:
        rows.append(
            (
                f"data, {used.role}",
                f"{used.name}: {used.count} used, {used.num_classes} classes, sha256 {used.fingerprint}",
            )
        )
        rows += [(f"could not be read: {one.key}", one.reason) for one in used.skipped[:_MOST_SKIPPED]]
        if len(used.skipped) > _MOST_SKIPPED:
            rows.append(("could not be read", f"and {len(used.skipped) - _MOST_SKIPPED} more"))
    grid = Grid(
        caption=f"{title_of(report.task)} of {report.model}: how it was made",
        columns=(Column(name="what", numeric=False), Column(name="value", numeric=False)),
        rows=tuple((Cell(text=name), Cell(text=value)) for name, value in rows),
    )
    return Collapsible(summary=report.model, blocks=(grid,))


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List the settings, then the resolved ones; those without a value are left out."""
    found = [(name, value) for name, value in settings.items() if name != "resolved" and value is not None]
    resolved = settings.get("resolved")
    if isinstance(resolved, Mapping):
        found += [(f"{name} (resolved)", value) for name, value in resolved.items()]
    return found


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _column(table: Table | None, name: str) -> dict[str, float]:
    """Return the numbers of a column by the first cell of their row."""
    if table is None or name not in table.columns:
        return {}
    place = table.columns.index(name)
    found = {}
    for row in table.rows:
        value = row[place] if len(row) > place else None
        if isinstance(value, (int, float)):
            found[str(row[0])] = float(value)
    return found


def _lowest_first(value: float | None) -> tuple[bool, float]:
    return value is None, value or 0.0


def _number(value: str | float | None, digits: int = 1) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) and not value.is_integer() else _whole(value)


def _whole(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)

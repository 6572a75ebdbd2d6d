"""Console tables that compare reports and summarise outcomes."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from radio.errors import DataError, shown

from .report import Metric, Report
from .suite import Outcome


def comparison(reports: Sequence[Report], *, plain: bool = False) -> Table:
    """Build a table with one column per report and one row per metric; the best of a row is bold.

    A value is followed by half of its 95 % interval, or by the standard deviation in brackets.

    Raises:
        DataError: no reports, or reports of different tasks.
    """
    tasks = {report.task for report in reports}
    if len(tasks) != 1:
        raise DataError(f"cannot compare reports of {', '.join(sorted(tasks)) or 'nothing'}; give one task's")
    table = Table(box=box.ASCII if plain else box.ROUNDED, title=_plain(tasks.pop()))
    table.add_column("", no_wrap=True)
    for report in reports:
        table.add_column(_plain(report.model), justify="right")
    for name in dict.fromkeys(name for report in reports for name in report.metrics):
        metrics = [report.metrics.get(name) for report in reports]
        best = _best(metrics) if len(reports) > 1 else None
        cells = [f"[bold]{cell(m)}[/bold]" if m and m.value == best else cell(m) for m in metrics]
        unit = next(metric.unit for metric in metrics if metric)
        table.add_row(_plain(f"{name} ({unit})" if unit else name), *cells)
    table.add_section()
    for place, used in enumerate(reports[0].data):
        counts = [str(report.data[place].count) if place < len(report.data) else "" for report in reports]
        table.add_row(_plain(f"{used.role}: {used.name}"), *counts)
    table.add_row("seconds", *(f"{report.seconds.get('total', 0):.1f}" for report in reports))
    return table


def summary(name: str, outcomes: Sequence[Outcome], *, plain: bool = False) -> Table:
    """Build a table with the outcome and the primary metric of every task of one model."""
    table = Table(box=box.ASCII if plain else box.ROUNDED, title=_plain(name))
    for title in ("task", "", "primary metric", "value", "seconds"):
        table.add_column(title, justify="right" if title in ("value", "seconds") else "left")
    for outcome in outcomes:
        report = outcome.report
        if report is None:
            table.add_row(_plain(outcome.task), outcome.state)
            continue
        metric = report.metrics[report.primary_metric]
        primary_metric = f"{report.primary_metric} ({metric.unit})" if metric.unit else report.primary_metric
        seconds = f"{report.seconds.get('total', 0):.1f}"
        table.add_row(_plain(outcome.task), outcome.state, _plain(primary_metric), cell(metric), seconds)
    return table


def cell(metric: Metric | None) -> str:
    """Format a value with half of its interval, or its standard deviation in brackets; empty for None."""
    if metric is None:
        return ""
    if metric.low is not None and metric.high is not None:
        return f"{metric.value:.1f} ±{(metric.high - metric.low) / 2:.1f}"
    return f"{metric.value:.1f} ({metric.std:.1f})" if metric.std is not None else f"{metric.value:.1f}"


def _plain(text: str) -> str:
    """Escape an external text for rich, without markup and control characters."""
    return escape(shown(text))


def _best(metrics: Sequence[Metric | None]) -> float | None:
    values = [metric.value for metric in metrics if metric]
    higher = next(metric.higher_is_better for metric in metrics if metric)
    return None if higher is None else (max if higher else min)(values)

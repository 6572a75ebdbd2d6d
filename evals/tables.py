"""Console tables: reports side by side, outcomes of a suite, and the architectures with their cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from radio.benchmark import count
from radio.errors import DataError, shown
from radio.model import make_student
from radio.students import StudentOptions, students
from radio.students.vit import ViT, global_blocks
from radio.teachers import families
from radio.types import Student

from .core.report import Metric, Report, metric_text
from .core.suite import Outcome


def comparison(reports: Sequence[Report], *, plain: bool = False) -> Table:
    """Build a table with one column per report and one row per metric; the best of a row is bold.

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
        cells = [
            f"[bold]{metric_text(m)}[/bold]" if m and m.value == best else metric_text(m) for m in metrics
        ]
        table.add_row(_with_unit(name, next(metric for metric in metrics if metric)), *cells)
    table.add_section()
    for place, used in enumerate(reports[0].data):
        counts = [str(report.data[place].count) if place < len(report.data) else "" for report in reports]
        table.add_row(_plain(f"{used.role}: {used.name}"), *counts)
    table.add_row("seconds", *map(_seconds, reports))
    return table


def summary(name: str, outcomes: Sequence[Outcome], *, plain: bool = False) -> Table:
    """Build a table with the outcome and the primary metric of every task of one model."""
    table = Table(box=box.ASCII if plain else box.ROUNDED, title=_plain(name))
    for title in ("task", "", "primary metric", "value", "seconds"):
        table.add_column(title, justify="right" if title in ("value", "seconds") else "left")
    for outcome in outcomes:
        cells: list[str] = []
        if (report := outcome.report) is not None:
            metric = report.metrics[report.primary_metric]
            cells = [_with_unit(report.primary_metric, metric), metric_text(metric), _seconds(report)]
        table.add_row(_plain(outcome.task), outcome.state, *cells)
    return table


def _plain(text: str) -> str:
    """Escape an external text for rich, without markup and control characters."""
    return escape(shown(text))


def _with_unit(name: str, metric: Metric) -> str:
    return _plain(f"{name} ({metric.unit})" if metric.unit else name)


def _seconds(report: Report) -> str:
    return f"{report.seconds.get('total', 0):.1f}"


def _best(metrics: Sequence[Metric | None]) -> float | None:
    values = [metric.value for metric in metrics if metric]
    higher = next(metric.higher_is_better for metric in metrics if metric)
    return None if higher is None else (max if higher else min)(values)


def print_models(console: Console) -> None:
    """Print how every kind of model is named: a spec, and the first line of its family's docstring."""
    lines = {
        "runs/demo/ckpt.pt": "A checkpoint of radio-train.",
        "arch:NAME": "An untrained architecture; radio-eval list --archs prints their names.",
    }
    for family in families:
        lines[f"{family}:…"] = (families[family].__doc__ or "").partition("\n")[0]
    for spec, text in lines.items():
        console.print(f"{spec:18} {shown(text)}", markup=False, highlight=False, soft_wrap=True)


def print_architectures(console: Console) -> None:
    """Print every architecture with its parameters and multiply-adds, counted on the meta device."""
    titles = ("architecture", "parameters (M)", "GMACs", "at", "summary", "token")
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=None)
    windows = []
    for name in students:
        try:
            with torch.device("meta"):
                student = make_student(name, StudentOptions())
        except Exception as error:  # noqa: BLE001 (a plug-in's student must not prevent listing the others)
            table.add_row(name, escape(f"cannot be built on the meta device: {str(error)[:100]}"))
            continue
        table.add_row(name, *_size_up(student))
        if isinstance(student, ViT) and student.config.window is not None:
            blocks = " ".join(map(str, global_blocks(student.config.depth, student.config.schedule)))
            windows.append(f"{name}: windows of {student.config.window}, global blocks {blocks}")
    console.print(table)
    for line in windows:
        console.print(line)


def _size_up(student: Student) -> tuple[str, ...]:
    """Return the cells of an architecture: parameters, multiply-adds, input size and widths."""
    assert isinstance(student, torch.nn.Module)
    height, width = student.native_size
    try:
        counts = count(student.eval(), (height, width))
    except Exception as error:  # noqa: BLE001 (as above)
        return (escape(f"cannot be run on the meta device: {str(error)[:100]}"),)
    return (
        f"{counts.parameters / 1e6:.2f}",
        f"{counts.gmacs:.2f}",
        f"{height}x{width}",
        str(student.summary_dim),
        str(student.token_dim),
    )

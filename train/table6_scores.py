"""Results of table 6: every student's scores and speed in one table, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.core.paper import PaperRow, table_6_row
from evals.core.report import Report
from evals.core.suite import run_all
from evals.core.tables import cell
from evals.reporting.tradeoff import draw_tradeoff
from evals.throughput.evaluator import Entry, measure_all
from evals.throughput.settings import ThroughputSettings
from radio.dist import Group
from radio.errors import MissingExtraError, shown
from radio.hub import load_backbone
from radio.progress import watch_on

from .config import TrainConfig
from .loggers import say
from .scoring import make_job, tell

FEW: Mapping[str, Mapping[str, Any]] = {"knn": {"scenes": (1200, 300)}, "zeroshot": {"scenes": 300}}
"""Settings of the tasks: the slowest student sees as many images as the fastest."""

SPEED: Mapping[str, Any] = {"batches": (8,)}
"""Settings of the measurement of speed."""


def compare(config: TrainConfig, checkpoints: Mapping[str, Path], out: Path, console: Console) -> None:
    """Score and measure every checkpoint, with reports in `out`, and print the table.

    Scores that exist and are unchanged are not computed again.

    Args:
        config: the tasks and the device.
        checkpoints: the students' checkpoints by name.
        out: folder of the reports.
        console: where to print the table.
    """
    watch = watch_on(console, shown=console.is_terminal)
    scores: dict[str, dict[str, Report | None]] = {}
    entries = []
    jobs = {task: make_job(task, config.device, FEW.get(task, {})) for task in config.score}
    for name, path in checkpoints.items():
        model = load_backbone(str(path))
        told = partial(tell, console, name)
        outcomes = run_all(model, jobs, out, name=name, watch=watch, group=Group(), tell=told)
        scores[name] = {outcome.task: outcome.report for outcome in outcomes}
        entries.append(Entry(name=name, model=model, paper_name=name))
    settings = ThroughputSettings(**SPEED, device=config.device)
    speeds = {report.model: report for report in measure_all(entries, settings, out, watch=watch)}
    console.print(_table(scores, speeds, config.score, plain=not console.is_terminal))
    try:
        draw_tradeoff(out)
    except MissingExtraError as error:
        say(console, f"no plot: {error}")


def _table(
    scores: Mapping[str, Mapping[str, Report | None]],
    speeds: Mapping[str, Report],
    tasks: Sequence[str],
    *,
    plain: bool,
) -> Table:
    """Build a table with a row per student: its scores and images per second, then the paper's."""
    table = Table(box=box.ASCII if plain else box.ROUNDED)
    table.add_column("student", overflow="fold")
    columns = [*tasks, "images/s"]
    for owner in ("", "paper: "):
        for column in columns:
            table.add_column(f"{owner}{column}", justify="right")
    for name, found in scores.items():
        speed = speeds[name].metrics["images_per_second"]
        own = [
            cell(report.metrics[report.primary_metric]) if report else "failed" for report in found.values()
        ]
        row = table_6_row(name)
        theirs = [_paper(row, column) for column in (*tasks, "images_per_second")]
        table.add_row(Text(shown(name)), *own, f"{speed.value:.4g}", *theirs)
    return table


def _paper(row: PaperRow | None, column: str) -> str:
    value = None if row is None else row.values.get(column)
    return "" if value is None else f"{value:g}"

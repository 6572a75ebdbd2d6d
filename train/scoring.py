"""The table at the end of a run: k-NN of the student, of its teachers, and of its untrained self."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from evals.core.evaluator import silent
from evals.core.report import Report
from evals.core.tables import cell
from evals.knn.evaluator import KnnEvaluator
from evals.knn.settings import KnnSettings
from radio.hub import load_backbone
from radio.types import Backbone

from .config import TrainConfig


def score(config: TrainConfig, path: Path, console: Console) -> list[Report]:
    """The k-NN reports on the scenes, written into `reports/` of the run folder and printed as one table."""
    settings = KnnSettings(device=config.device)
    evaluator = KnnEvaluator()
    reports = []
    for name, model in _contestants(config, path):
        console.print(f"k-NN of {name}", highlight=False)
        reports.append(evaluator.run(model, settings, config.out / "reports", name=name, watch=silent))
    console.print(_table(reports, plain=not console.is_terminal))
    return reports


def _table(reports: list[Report], *, plain: bool) -> Table:
    """A row for each model."""
    bank, query = reports[0].data
    title = f"k-NN (k = 20), {query.count} pictures of {query.name} among {bank.count} of {bank.name}"
    table = Table("model", title=title, box=box.ASCII if plain else box.ROUNDED, title_justify="left")
    for name in ("top-1 (%)", "top-5 (%)"):
        table.add_column(name, justify="right")
    for report in reports:
        table.add_row(report.model, *(cell(report.metrics[name]) for name in ("top1", "top5")))
    return table


def _contestants(config: TrainConfig, path: Path) -> Iterator[tuple[str, Backbone]]:
    """The models of the table under the names it gives them, each loaded when its turn comes."""
    yield "student", load_backbone(str(path))
    yield "untrained", load_backbone(str(path), random_init=True, seed=config.seed)
    for teacher in config.teachers:
        yield teacher.model, load_backbone(teacher.model)

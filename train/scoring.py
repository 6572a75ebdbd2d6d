"""The table at the end of a run: k-NN of the student, of its teachers, and of its untrained self."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from evals.core.evaluator import silent
from evals.core.report import Report
from evals.core.tables import comparison
from evals.knn.evaluator import KnnEvaluator
from evals.knn.settings import KnnSettings
from radio.hub import load_backbone
from radio.types import Backbone

from .config import TrainConfig


def score(config: TrainConfig, path: Path, console: Console) -> list[Report]:
    """The k-NN reports on the scenes, written into `reports/` of the run folder and printed side by side."""
    settings = KnnSettings(device=config.device)
    evaluator = KnnEvaluator()
    reports = []
    for name, model in _contestants(config, path):
        console.print(f"k-NN of {name}", highlight=False)
        reports.append(evaluator.run(model, settings, config.out / "reports", name=name, watch=silent))
    console.print(comparison(reports, plain=not console.is_terminal))
    return reports


def _contestants(config: TrainConfig, path: Path) -> Iterator[tuple[str, Backbone]]:
    """The models of the table under the names it gives them, each loaded when its turn comes."""
    yield "student", load_backbone(str(path))
    yield "untrained", load_backbone(str(path), random_init=True, seed=config.seed)
    for teacher in config.teachers:
        yield teacher.model, load_backbone(teacher.model)

"""The end of a run: student, untrained student and teachers, each on the tasks it can do, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import evals.cli  # noqa: F401 (enters the evaluators)
from evals.core.dist import Group
from evals.core.evaluator import Evaluator, evaluators
from evals.core.progress import watch_on
from evals.core.suite import Outcome, run_all
from evals.core.tables import cell
from radio.hub import load_backbone
from radio.types import Backbone

from .config import TrainConfig

_STUDENTS_ONLY = "vqa"  # a language model is trained for it: minutes a model

_PICTURES = {"seg": {"save_maps": 3}, "sam": {"save_masks": 3}}  # for the page of the run

Jobs = Mapping[str, tuple[Evaluator[Any], Any]]


def score(config: TrainConfig, path: Path, console: Console) -> dict[str, list[Outcome]]:
    """The outcomes of each model, with reports in `reports/` of the run folder, printed as one table.

    Run again, it keeps what is done and unchanged.
    """
    jobs = {task: _job(task, config.device) for task in config.score}
    watch = watch_on(console, shown=console.is_terminal)
    found = {}
    for name, model, its_own in _contestants(config, path):
        chosen: Jobs = {task: job for task, job in jobs.items() if its_own or task != _STUDENTS_ONLY}
        out = config.out / "reports"
        tell = partial(_tell, console, name)
        found[name] = run_all(model, chosen, out, name=name, watch=watch, group=Group(), tell=tell)
    console.print(_table(found, config.score, plain=not console.is_terminal))
    return found


def _job(task: str, device: str) -> tuple[Evaluator[Any], Any]:
    evaluator = evaluators[task]()
    return evaluator, evaluator.settings(device=device, **_PICTURES.get(task, {}))


def _tell(console: Console, name: str, line: str) -> None:
    console.print(escape(f"{name}: {line}"), highlight=False, soft_wrap=True)


def _contestants(config: TrainConfig, path: Path) -> Iterator[tuple[str, Backbone, bool]]:
    """The models under their names in the table, each loaded in its turn, and whether the run trained it."""
    yield "student", load_backbone(str(path)), True
    yield "untrained", load_backbone(str(path), random_init=True, seed=config.seed), False
    for teacher in config.teachers:
        yield teacher.model, load_backbone(teacher.model), False


def _table(found: Mapping[str, Sequence[Outcome]], tasks: Sequence[str], *, plain: bool) -> Table:
    """A row for each model, a column for each task's headline."""
    headlines = {
        outcome.task: outcome.report.headline
        for outcomes in found.values()
        for outcome in outcomes
        if outcome.report is not None
    }
    table = Table("model", box=box.ASCII if plain else box.ROUNDED)
    for task in tasks:
        table.add_column(f"{task}\n{headlines.get(task, '')} (%)", justify="right")
    for name, outcomes in found.items():
        cells = {
            outcome.task: cell(outcome.report.metrics[outcome.report.headline])
            if outcome.report
            else "failed"
            for outcome in outcomes
            if outcome.state != "left out"
        }
        table.add_row(name, *(cells.get(task, "") for task in tasks))
    return table

"""Scores at the end of a run: student, untrained student and teachers on their tasks, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.core.paper import DATA, TASKS, PaperRow
from evals.core.report import metric_text
from evals.core.suite import Jobs, Outcome, run_all
from evals.core.task import Evaluator, RunSettings, make_evaluator
from radio.dist import Ranks
from radio.errors import ConfigError, shown
from radio.hub import load_backbone
from radio.progress import watch_on
from radio.types import Backbone

from .config import TrainConfig
from .loggers import LOG, Record, read_records, say


def score(
    config: TrainConfig,
    students: Mapping[str, Path],
    out: Path,
    console: Console,
    paper: Sequence[PaperRow] = (),
) -> dict[str, list[Outcome]]:
    """Score each model, write reports to `out`, print one table and return the outcomes.

    Scores that exist and are unchanged are not computed again.

    Args:
        config: the tasks, and the teachers to score in addition to the students.
        students: checkpoints by name in the table; the first also defines the untrained student.
        out: folder of the reports.
        console: where to print the table.
        paper: the paper's rows to print below.
    """
    jobs = {task: make_job(task) for task in config.score}
    outcomes_of = {}
    for name, model, its_own in _contestants(config, students):
        chosen: Jobs = {task: job for task, job in jobs.items() if its_own or not job[0].expensive}
        is_untrained = name == "untrained"
        outcomes_of[name] = run_jobs(
            config, model, chosen, out, console, name=name, is_untrained=is_untrained
        )
    console.print(_table(outcomes_of, config.score, paper, plain=not console.is_terminal))
    for line in _measured_on(config.score, paper):
        say(console, line)
    return outcomes_of


def run_jobs(
    config: TrainConfig,
    model: Backbone,
    jobs: Jobs,
    out: Path,
    console: Console,
    *,
    name: str,
    is_untrained: bool = False,
) -> list[Outcome]:
    """Run the evaluators of `make_job` on one model, on the run's device; reports go to `out`."""
    return run_all(
        model,
        jobs,
        out,
        run=RunSettings(device=config.device),
        name=name,
        kind="untrained" if is_untrained else None,
        progress=watch_on(console, shown=console.is_terminal),
        ranks=Ranks(),
        log=partial(tell, console, name),
    )


class Follower:
    """Evaluates the student during training. Every rank calls it and takes part.

    Args:
        config: tasks, device and run folder.
        group: the ranks.
        console: where to report.

    Raises:
        ConfigError: a task is unknown.
    """

    def __init__(self, config: TrainConfig, group: Ranks, console: Console) -> None:
        self.config, self.group, self.console = config, group, console
        self.jobs = {task: make_job(task) for task in config.eval_tasks}

    def evaluate(self, step: int) -> Record:
        """Evaluate `ckpt.pt`; return primary metrics (`knn/top1`), write reports to `reports/step-000200`."""
        model = load_backbone(str(self.config.out / "ckpt.pt"))
        outcomes = run_all(
            model,
            self.jobs,
            self.config.out / "reports" / f"step-{step:06d}",
            run=RunSettings(device=self.config.device),
            name="student",
            progress=watch_on(self.console, shown=False),
            ranks=self.group,
            log=partial(tell, self.console, f"step {step}"),
        )
        reports = [outcome.report for outcome in outcomes if outcome.report is not None]
        record: Record = {"step": step}
        for report in reports:
            record[f"{report.task}/{report.primary_metric}"] = report.metrics[report.primary_metric].value
        figures = ", ".join(
            f"{name} {value:.1f}" for name, value in record.items() if isinstance(value, float)
        )
        tell(self.console, f"step {step}", figures or "no task could be evaluated")
        return record

    def has_done(self, step: int) -> bool:
        """Check whether the run's log has the evaluation of a step."""
        records = [record for record in read_records(self.config.out / LOG) if record["step"] == step]
        # Training records have a loss; their keys may start with a teacher named like a task.
        evaluations = [record for record in records if "loss" not in record]
        return any(key.partition("/")[0] in self.jobs for record in evaluations for key in record)


def make_job(task: str, settings: Mapping[str, Any] | None = None) -> tuple[Evaluator[Any], Any]:
    """Make an evaluator and its settings: its defaults, overridden by those of `settings` that it has.

    Raises:
        ConfigError: the task is unknown, or requires settings that a run does not have.
    """
    evaluator, given = make_evaluator(task), settings or {}
    known = {field.name: field for field in fields(evaluator.settings) if field.init}
    missing = [name for name, field in known.items() if name not in given and _is_required(field)]
    if missing:
        raise ConfigError(
            f"{task} cannot be scored by a run: it needs {', '.join(missing)}; leave it out, and give the "
            f"checkpoint to radio-eval {task} afterwards"
        )
    return evaluator, evaluator.settings(**{name: given[name] for name in known if name in given})


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def tell(console: Console, name: str, line: str) -> None:
    """Print a line about one model."""
    say(console, f"{name}: {line}")


def _contestants(config: TrainConfig, students: Mapping[str, Path]) -> Iterator[tuple[str, Backbone, bool]]:
    """Load one model after another; yield its name in the table, itself, and whether the run trained it."""
    for name, path in students.items():
        yield name, load_backbone(str(path)), True
    first = str(next(iter(students.values())))
    yield "untrained", load_backbone(first, random_init=True, seed=config.seed), False
    for teacher in config.teachers:
        yield teacher.model, load_backbone(teacher.model), False


def _table(
    outcomes_of: Mapping[str, Sequence[Outcome]],
    tasks: Sequence[str],
    paper: Sequence[PaperRow],
    *,
    plain: bool,
) -> Table:
    """Build a table with a row per model and a column per task; the paper's rows are a separate section."""
    headlines = {
        outcome.task: outcome.report.primary_metric
        for outcomes in outcomes_of.values()
        for outcome in outcomes
        if outcome.report is not None
    }
    table = Table("model", box=box.ASCII if plain else box.ROUNDED)
    for task in tasks:
        table.add_column(Text(f"{shown(task)}\n{shown(headlines.get(task, ''))} (%)"), justify="right")
    for name, outcomes in outcomes_of.items():
        cells = {
            outcome.task: metric_text(outcome.report.metrics[outcome.report.primary_metric])
            if outcome.report
            else "failed"
            for outcome in outcomes
            if outcome.state != "left out"
        }
        table.add_row(Text(shown(name)), *(cells.get(task, "") for task in tasks))
    table.add_section()
    for row in paper:
        values = [row.values.get(column) for column in _columns(tasks)]
        cells_of_paper = ("" if value is None else f"{value:.2f}" for value in values)
        table.add_row(f"paper: {row.model}", *cells_of_paper)
    return table


def _columns(tasks: Sequence[str]) -> list[str]:
    """Return the paper's column for each task; empty where it has none."""
    return [TASKS[task][0] if task in TASKS else "" for task in tasks]


def _measured_on(tasks: Sequence[str], paper: Sequence[PaperRow]) -> Iterator[str]:
    """Yield lines on the data behind the paper's rows, which differ from those of the other rows."""
    for source in dict.fromkeys(row.source for row in paper):
        data = "; ".join(
            f"{task}: {DATA[column]}" for task, column in zip(tasks, _columns(tasks), strict=True) if column
        )
        yield f"paper: {source}, on other data than the rows above ({data})"

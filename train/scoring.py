"""Scores at the end of a run: student, untrained student and teachers on their tasks, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.core.paper import DATA, TASKS, PaperRow
from evals.core.suite import Contestant, Outcome, run_contestants
from evals.core.task import RunSettings, make_evaluator, task_of
from radio.dist import Ranks
from radio.errors import shown
from radio.hub import load_backbone
from radio.progress import no_progress, watch_on
from radio.resources import choose_device

from .config import TrainConfig
from .loggers import LOG, Record, read_records, say
from .tasks import Tasks, scored_jobs

MAX_WORKERS = 4  # processes that score side by side: each holds the libraries, about 1 GB


def score(
    config: TrainConfig,
    students: Mapping[str, Path],
    out: Path,
    console: Console,
    paper: Sequence[PaperRow] = (),
    *,
    workers: int = 1,
) -> dict[str, list[Outcome]]:
    """Score each model, write reports to `out`, print one table and return the outcomes.

    Scores that exist and are unchanged are not computed again.

    Args:
        config: the tasks with their settings, and the teachers to score in addition to the students.
        students: checkpoints by name in the table; the first also defines the untrained student.
        out: folder of the reports.
        console: where to print the table.
        paper: the paper's rows to print below.
        workers: processes; see `run_contestants`.
    """
    tasks = scored_jobs(config, config.score)
    contestants = [
        *_trained(students, tasks, out),
        _untrained(config, next(iter(students.values())), tasks, out),
        *_trained({teacher.model: teacher.model for teacher in config.teachers}, _cheap(tasks), out),
    ]
    outcomes = _run(config, contestants, console, workers)
    console.print(_table(outcomes, tuple(tasks), paper, plain=not console.is_terminal))
    for line in _measured_on(tuple(tasks), paper):
        say(console, line)
    return outcomes


def num_workers(config: TrainConfig, ranks: Ranks | None = None) -> int:
    """Return how many processes score side by side: some on a CPU, one on a GPU or with several ranks."""
    alone = (ranks or Ranks()).world == 1 and choose_device(config.device).type == "cpu"
    return min(torch.get_num_threads(), MAX_WORKERS) if alone else 1


def _run(
    config: TrainConfig, contestants: Sequence[Contestant], console: Console, workers: int
) -> dict[str, list[Outcome]]:
    return run_contestants(
        contestants,
        run=RunSettings(device=config.device),
        workers=workers,
        progress=watch_on(console, shown=console.is_terminal),
        log=partial(tell, console),
    )


def _cheap(tasks: Tasks) -> Tasks:
    """Leave out what takes long; only the run's students get it."""
    return {job: settings for job, settings in tasks.items() if not make_evaluator(task_of(job)).expensive}


def _trained(models: Mapping[str, Path | str], tasks: Tasks, out: Path) -> list[Contestant]:
    return [
        Contestant(name=name, load=partial(load_backbone, str(spec)), tasks=tasks, out=out)
        for name, spec in models.items()
    ]


def _untrained(config: TrainConfig, checkpoint: Path, tasks: Tasks, out: Path) -> Contestant:
    load = partial(load_backbone, str(checkpoint), random_init=True, seed=config.seed)
    return Contestant(name="untrained", load=load, tasks=_cheap(tasks), out=out, kind="untrained")


class Follower:
    """Evaluates the student during training. Every rank calls it and takes part.

    The first evaluation of a run also scores the untrained student, and prints both in a table; scores of the
    untrained one that exist are not computed again, neither then nor at the end of the run.

    Args:
        config: tasks, device and run folder.
        group: the ranks.
        console: where to report.
        workers: processes; see `run_contestants`.

    Raises:
        ConfigError: as `scored_jobs`.
    """

    def __init__(self, config: TrainConfig, group: Ranks, console: Console, workers: int = 1) -> None:
        self.config, self.group, self.console, self.workers = config, group, console, workers
        self.tasks = scored_jobs(config, config.eval_tasks)
        self._compared = False

    def evaluate(self, step: int) -> Record:
        """Evaluate `ckpt.pt`; return primary metrics (`knn/top1`), write reports to `reports/step-000200`."""
        out, checkpoint = self.config.out / "reports", self.config.out / "ckpt.pt"
        name = f"step {step}"
        contestants = _trained({"student": checkpoint}, self.tasks, out / f"step-{step:06d}")
        if not self._compared:
            contestants.append(_untrained(self.config, checkpoint, self.tasks, out))
        outcomes = run_contestants(
            contestants,
            run=RunSettings(device=self.config.device),
            workers=self.workers,
            progress=no_progress,
            log=lambda model, line: tell(self.console, name if model == "student" else model, line),
            ranks=self.group,
        )
        of_student = outcomes.pop("student")
        if not self._compared:
            both = {name: of_student, **outcomes}
            self.console.print(_table(both, tuple(self.tasks), (), plain=not self.console.is_terminal))
            self._compared = True
        record: Record = {"step": step}
        for outcome in of_student:
            if (report := outcome.report) is not None:
                key = f"{_log_key(outcome.task)}/{report.primary_metric}"
                record[key] = report.metrics[report.primary_metric].value
        figures = ", ".join(
            f"{name} {value:.1f}" for name, value in record.items() if isinstance(value, float)
        )
        tell(self.console, name, figures or "no task could be evaluated")
        return record

    def has_done(self, step: int) -> bool:
        """Check whether the run's log has the evaluation of a step."""
        records = [record for record in read_records(self.config.out / LOG) if record["step"] == step]
        # Training records have a loss; their keys may start with a teacher named like a task.
        evaluations = [record for record in records if "loss" not in record]
        keys = {_log_key(job) for job in self.tasks}
        return any(key.partition("/")[0] in keys for record in evaluations for key in record)


def _log_key(job: str) -> str:
    """Return the name of a task in the log, with its data set where it has one: `knn`, `seg-voc`."""
    task = task_of(job)
    return task + job.removeprefix(task).replace(" on ", "-")


def tell(console: Console, name: str, line: str) -> None:
    """Print a line about one model."""
    say(console, f"{name}: {line}")


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
            outcome.task: outcome.primary_metric_text for outcome in outcomes if outcome.state != "left out"
        }
        table.add_row(Text(shown(name)), *(cells.get(task, "") for task in tasks))
    table.add_section()
    for row in paper:
        values = [row.values.get(column) for column in _columns(tasks)]
        cells_of_paper = ("" if value is None else f"{value:.2f}" for value in values)
        table.add_row(f"paper: {row.model}", *cells_of_paper)
    return table


def _columns(jobs: Sequence[str]) -> list[str]:
    """Return the paper's column for each task, of its data set where it has one; empty where it has none."""
    columns: list[str] = []
    for job in jobs:
        task = task_of(job)
        known = TASKS.get(task, ("",))
        columns += [name for name in known if job == f"{task} on {name}"] or known[:1]
    return columns


def _measured_on(jobs: Sequence[str], paper: Sequence[PaperRow]) -> Iterator[str]:
    """Yield lines on the paper's rows: on which data they are, where other rows are on none of its sets."""
    others = [job for job in jobs if task_of(job) == job]
    data = "; ".join(
        f"{job}: {DATA[column]}" for job, column in zip(others, _columns(others), strict=True) if column
    )
    for source in dict.fromkeys(row.source for row in paper):
        yield f"paper: {source}" + (f", on other data than the rows above ({data})" if data else "")

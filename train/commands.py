"""The commands of `radio-train`: train runs one after another, or print their plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from radio.dist import Ranks
from radio.resources import choose_device, collect, locked

from .config import PlanOptions, TrainConfig
from .distributed import REQUEUE, Preemption, join
from .loggers import say
from .normalise import check_loss_weights
from .plan import make_plan, print_plan, sum_up
from .setup import round_resolutions
from .stages import check_next_teachers, check_stages, find_stage, split_stages
from .tasks import check_data, scored_jobs, scored_tasks
from .trainer import Trainer


def run(name: str, config: TrainConfig, console: Console, *, restart: bool) -> int:
    """Train one run, then score its checkpoint if the settings say so; return the exit code.

    Raises:
        RadioError: data or weights are missing, or the run cannot continue.
    """
    trained = train_all({name: config}, console, restart=restart)
    if trained.stopped:
        return REQUEUE
    if trained.leads and config.score:
        from .scoring import num_workers, score

        students = {"student": trained.checkpoints[name]}
        score(config, students, config.out / "reports", console, workers=num_workers(config))
    return 0


def plan(runs: Mapping[str, TrainConfig], options: PlanOptions, console: Console) -> int:
    """Print the plan of each stage of runs, and the sum of several; return the exit code 0."""
    for run in runs.values():
        check_tasks(run)
        check_loss_weights(run)
        plans = []
        for stage in split_stages(run):
            config, changes = round_resolutions(stage.config)
            for line in (*changes, *([f"stage {stage.index + 1}:"] if run.stages else [])):
                say(console, line)
            plans.append(make_plan(config, options))
            print_plan(plans[-1], console)
        if run.stages:
            say(console, sum_up(plans))
    return 0


class TrainedRows(NamedTuple):
    """Result of some runs."""

    checkpoints: dict[str, Path]
    stopped: bool  # by a signal: the last of them is not finished
    leads: bool  # whether this is the first rank, which does the rest


def train_all(
    runs: Mapping[str, TrainConfig],
    console: Console,
    *,
    restart: bool = False,
    after: Callable[[Path, Ranks], None] | None = None,
) -> TrainedRows:
    """Train runs of one device one after another; each resumes where it was stopped.

    Args:
        runs: their settings by name.
        console: where the first rank reports.
        restart: start every run over.
        after: called by every rank with the checkpoint of each finished run.

    Raises:
        RadioError: a run failed; errors in the settings are raised before the first run.
    """
    checkpoints: dict[str, Path] = {}
    with join(device := choose_device(next(iter(runs.values())).device)) as group:
        for config in runs.values():
            check_stages(config, group.world)
            check_data(config)
        screen = console if group.leads else Console(quiet=True)
        for name, config in runs.items():
            with _alone(config.out, group):
                trained = train_stages(config, group, device, screen, restart=restart)
            if trained is None:
                return TrainedRows(checkpoints, stopped=True, leads=group.leads)
            checkpoints[name] = trained
            say(screen, f"checkpoint: {checkpoints[name]}")
            if after is not None:
                after(checkpoints[name], group)
    return TrainedRows(checkpoints, stopped=False, leads=group.leads)


def train_stages(
    run: TrainConfig, group: Ranks, device: torch.device, console: Console, *, restart: bool
) -> Path | None:
    """Train the stages of a run that are not done; return its checkpoint, None where a signal stopped it.

    Raises:
        RadioError: as `Trainer` and its `train`.
    """
    stages = split_stages(run)
    with Preemption(group) as stop:
        left = stages[0 if restart else find_stage(stages, run.out, group) :]
        group.on_leader(lambda: check_next_teachers(left))
        for stage in left:
            config, changes = round_resolutions(stage.config)
            for line in changes:
                say(console, line)
            if not run.stages:  # with the resolutions that it trains at
                stage = replace(stage, run=config)
            trainer = Trainer(
                config,
                group,
                device,
                console,
                restart=restart and not stage.index,
                eval_workers=_eval_workers(config, group),
                stage=stage,
                stop=stop,
            )
            checkpoint = trainer.train()
            if trainer.stopped:
                line = f"stopped after step {trainer.step} of {run.out}; the same command goes on from there"
                say(console, line)
                return None
            del trainer
            collect()  # frees reference cycles of the trainer, for the next model's memory
    return checkpoint


def check_tasks(config: TrainConfig) -> None:
    """Check that the run gives the settings that its evaluators require.

    Raises:
        ConfigError: as `scored_jobs`.
    """
    scored_jobs(config, scored_tasks(config))


def _eval_workers(config: TrainConfig, group: Ranks) -> int:
    if not config.eval_every:
        return 1
    from .scoring import num_workers

    return num_workers(config, group)


@contextmanager
def _alone(folder: Path, group: Ranks) -> Iterator[None]:
    """Lock a run folder against other trainers; the first rank does it, and all get the result.

    Raises:
        RadioError: another trainer has locked it.
    """
    with ExitStack() as held:
        group.on_leader(lambda: held.enter_context(locked(folder, "trained")))
        yield

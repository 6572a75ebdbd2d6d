"""A table of the paper made again: a run for each row, one after another, then all of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from rich.console import Console

from evals.core.dist import Group
from evals.core.provenance import choose_device
from radio.errors import ConfigError, did_you_mean
from radio.lock import locked
from radio.memory import collect
from radio.registry import Registry

from .assembly import check_settings, fitted
from .config import TrainConfig
from .parallel import join
from .sinks import say
from .trainer import Run

Rows: TypeAlias = Mapping[str, TrainConfig]
Finish: TypeAlias = Callable[[Rows, Mapping[str, Path], Path, Console], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """Runs that differ in one thing."""

    base: TrainConfig  # what they share; `out` is the table's folder, with one in it for each row
    rows: Callable[[TrainConfig], Rows]  # by name, from the base with what the command line changed
    finish: Finish  # scores the rows' checkpoints, in the table's folder, and prints the table


tables: Registry[Callable[[], PaperTable]] = Registry("table")


class Trained(NamedTuple):
    """What became of some runs."""

    checkpoints: dict[str, Path]
    stopped: bool  # on request: the last of them is not at its end
    leads: bool  # whether this rank is the one that goes on from here


def rows_of(table: PaperTable, base: TrainConfig, names: tuple[str, ...] = ()) -> dict[str, TrainConfig]:
    """The rows of these names in the table's order, in folders of their own; all when none is named.

    Raises:
        ConfigError: the table has no such row, or no row at all with these settings.
    """
    rows = table.rows(base)
    for name in names:
        if name not in rows:
            hint = did_you_mean(name, rows) or f"; it has {', '.join(rows)}"
            raise ConfigError(f"the table has no row {name!r}{hint}")
    return {
        name: replace(config, out=base.out / name.replace(":", "-"))
        for name, config in rows.items()
        if not names or name in names
    }


def check_tasks(config: TrainConfig) -> None:
    """None, when the run can give every evaluator that it names what it needs."""
    if tasks := (*config.score, *(config.eval_tasks if config.eval_every else ())):
        from .scoring import make_job  # the evaluators are many modules

        for task in tasks:
            make_job(task, config.device, {})


@contextmanager
def _alone(folder: Path, group: Group) -> Iterator[None]:
    """Hold a run folder against other trainers; the first rank does, and all learn whether it can.

    Raises:
        RadioError: another trainer has it.
    """
    with ExitStack() as held:
        group.on_leader(lambda: held.enter_context(locked(folder, "trained")))
        yield


def train_all(runs: Rows, console: Console, *, restart: bool = False) -> Trained:
    """Train runs of one device one after another; each goes on where it was stopped.

    Args:
        runs: their settings by name.
        console: where the first rank reports.
        restart: begin every one anew.

    Raises:
        RadioError: as a run does, and before the first one where settings alone tell.
    """
    found: dict[str, Path] = {}
    with join(device := choose_device(next(iter(runs.values())).device)) as group:
        for config in runs.values():
            check_settings(config, group.world)
            check_tasks(config)
        screen = console if group.leads else Console(quiet=True)
        for name, asked in runs.items():
            config, changes = fitted(asked)
            for line in changes:
                say(screen, line)
            with _alone(config.out, group):
                run = Run(config, group, device, screen, restart=restart)
                found[name] = run.train()
            if run.stopped:
                line = f"stopped after step {run.step} of {config.out}; the same command goes on from there"
                say(screen, line)
                return Trained(found, stopped=True, leads=group.leads)
            say(screen, f"checkpoint: {found[name]}")
            del run
            collect()  # a run and its callbacks hold one another, and the next model wants the memory
    return Trained(found, stopped=False, leads=group.leads)

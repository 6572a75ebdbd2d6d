"""A table of the paper reproduced: one run per row, in sequence, then a comparison of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from rich.console import Console

from radio.dist import Group
from radio.errors import ConfigError, did_you_mean
from radio.lock import locked
from radio.memory import collect
from radio.provenance import choose_device
from radio.registry import Registry

from .assembly import check_settings, round_resolutions
from .config import TrainConfig
from .loggers import say
from .parallel import join
from .trainer import Trainer

Rows: TypeAlias = Mapping[str, TrainConfig]
Finish: TypeAlias = Callable[[Rows, Mapping[str, Path], Path, Console], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """The runs behind a table, one per row."""

    base: TrainConfig  # the shared settings; `out` is the table's folder, with a subfolder per row
    rows: Callable[[TrainConfig], Rows]  # the rows by name, from the base with command-line overrides
    finish: Finish  # scores the rows' checkpoints, in the table's folder, and prints the table


tables: Registry[Callable[[], PaperTable]] = Registry("table")


class Trained(NamedTuple):
    """Result of some runs."""

    checkpoints: dict[str, Path]
    stopped: bool  # by a signal: the last of them is not finished
    leads: bool  # whether this is the first rank, which does the rest


def rows_of(table: PaperTable, base: TrainConfig, names: tuple[str, ...] = ()) -> dict[str, TrainConfig]:
    """Return the named rows (default: all) in the table's order, each in a separate folder.

    Raises:
        ConfigError: the table has no such row, or no rows with these settings.
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
    """Check that the run can provide the settings that its evaluators require."""
    if tasks := (*config.score, *(config.eval_tasks if config.eval_every else ())):
        from .scoring import make_job  # the evaluators are many modules

        for task in tasks:
            make_job(task, config.device, {})


@contextmanager
def _alone(folder: Path, group: Group) -> Iterator[None]:
    """Lock a run folder against other trainers; the first rank does it, and all get the result.

    Raises:
        RadioError: another trainer has locked it.
    """
    with ExitStack() as held:
        group.on_leader(lambda: held.enter_context(locked(folder, "trained")))
        yield


def train_all(runs: Rows, console: Console, *, restart: bool = False) -> Trained:
    """Train runs of one device one after another; each resumes where it was stopped.

    Args:
        runs: their settings by name.
        console: where the first rank reports.
        restart: start every run over.

    Raises:
        RadioError: a run failed; errors in the settings are raised before the first run.
    """
    found: dict[str, Path] = {}
    with join(device := choose_device(next(iter(runs.values())).device)) as group:
        for config in runs.values():
            check_settings(config, group.world)
            check_tasks(config)
        screen = console if group.leads else Console(quiet=True)
        for name, asked in runs.items():
            config, changes = round_resolutions(asked)
            for line in changes:
                say(screen, line)
            with _alone(config.out, group):
                run = Trainer(config, group, device, screen, restart=restart)
                found[name] = run.train()
            if run.stopped:
                line = f"stopped after step {run.step} of {config.out}; the same command goes on from there"
                say(screen, line)
                return Trained(found, stopped=True, leads=group.leads)
            say(screen, f"checkpoint: {found[name]}")
            del run
            collect()  # frees reference cycles of the run, for the next model's memory
    return Trained(found, stopped=False, leads=group.leads)

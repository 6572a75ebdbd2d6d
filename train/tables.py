"""A table of the paper made again: a run for each row, all scored alike, the paper's own rows beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from evals.core.paper import PaperRow
from evals.core.provenance import choose_device
from radio.config import to_plain
from radio.errors import ConfigError, did_you_mean
from radio.registry import Registry

from .assembly import check_settings
from .config import TrainConfig
from .parallel import join
from .preempt import REQUEUE
from .trainer import Run

Show: TypeAlias = Callable[[Mapping[str, Path], Path, Console], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """Runs that differ in one thing, and what the paper found."""

    rows: Mapping[
        str, TrainConfig
    ]  # by name; `out` is the folder of the whole table, with one in it for each
    paper: tuple[PaperRow, ...]
    show: Show | None = None  # what else there is to see of the rows' folders, in the table's folder


tables: Registry[Callable[[], PaperTable]] = Registry("table")


def chosen_rows(table: PaperTable, names: tuple[str, ...]) -> dict[str, TrainConfig]:
    """The rows of these names in the table's order; all of them when none is named.

    Raises:
        ConfigError: the table has no such row.
    """
    for name in names:
        if name not in table.rows:
            hint = did_you_mean(name, table.rows) or f"; it has {', '.join(table.rows)}"
            raise ConfigError(f"the table has no row {name!r}{hint}")
    return {name: config for name, config in table.rows.items() if not names or name in names}


def run_table(
    table: PaperTable, rows: Mapping[str, TrainConfig], console: Console, *, restart: bool = False
) -> int:
    """The exit code, after the rows were trained one after the other, scored, and printed as one table.

    Every row has a folder of its own and goes on where it was stopped; reports are kept while unchanged.

    Args:
        table: the paper's rows, and what else to show.
        rows: the runs by name, as in the table but for what the command line changed.
        console: where it is printed.
        restart: begin every row anew.

    Returns:
        0, or 85 where a signal stopped a row, which has saved.

    Raises:
        RadioError: as a run does, and before the first one where settings alone tell.
    """
    _check_apart(rows)
    first = next(iter(rows.values()))
    device = choose_device(first.device)
    students = {}
    with join(device) as group:
        for config in rows.values():
            check_settings(config, group.world)
        screen = console if group.leads else Console(quiet=True)
        for name, config in rows.items():
            row = replace(config, out=config.out / name)
            run = Run(row, group, device, screen, restart=restart)
            students[name] = run.train()
            if run.stopped:
                line = f"stopped after step {run.step} of {name}; the same command goes on from there"
                screen.print(line, highlight=False, soft_wrap=True)
                return REQUEUE
    if not group.leads:
        return 0
    if first.score:
        from .scoring import score  # only now: with all evaluators behind it

        score(first, students, first.out / "reports", console, table.paper)
    if table.show is not None:
        table.show({name: path.parent for name, path in students.items()}, first.out, console)
    return 0


def _check_apart(rows: Mapping[str, TrainConfig]) -> None:
    seen: list[tuple[str, object]] = []
    for name, config in rows.items():
        settings = to_plain(replace(config, recipe=""))
        for other, known in seen:
            if settings == known:
                raise ConfigError(
                    f"the rows {other} and {name} would be the same run; leave out the option that makes "
                    f"them so, or name one of them with --rows"
                )
        seen.append((name, settings))

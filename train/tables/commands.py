"""The command of a table: make its rows, collect them, plan them, or rehearse them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from radio.dist import Ranks
from radio.io import write_text

from ..commands import check_tasks, train_all
from ..config import TrainConfig
from ..distributed import REQUEUE, join
from ..loggers import LOG, say
from ..setup import check_settings
from .layout import PaperTable, Runs, choose_runs, runs_of
from .making import Row, evaluation_settings, is_done, rows_of, score_row
from .options import TableCommand
from .paper_size import use_data_sets


def run_tables(
    tables: Sequence[PaperTable], default: TrainConfig, command: TableCommand, console: Console, words: str
) -> int:
    """Run the command of tables; return its exit code: 1 where a row failed, 85 where it was stopped.

    Args:
        tables: one, or all.
        default: the settings that the command line replaced some of.
        command: its options.
        console: where to print.
        words: the command, for the page.

    Raises:
        RadioError: a row is unknown, or its settings, data or weights do not fit.
    """
    given = [(table, _runs(table, default, command)) for table in tables]
    rows = rows_of(given)
    results = command.results or command.config.out / "results"
    if command.rows:
        known: dict[str, TrainConfig] = {row.name: row.config for row in rows}
        names = choose_runs(known, command.rows)
        rows = [row for row in rows if row.name in names]
    if command.plan:
        from .plans import plan_rows

        runs = {row.name: row.config for row in rows if not row.spec}
        plan_rows(runs, command.planning, command.price_per_gpu_hour, console)
        return 0
    if command.rehearse:
        from .rehearsal import rehearse

        failed = rehearse(rows, command.planning, console)
        show(given, command, results, console, words, write=False)
        return int(failed > 0)
    code = 0 if command.collect else make_rows(rows, command, results, console)
    if code in (0, 1):
        if not command.collect and not command.rows:
            _measure_speeds(given, rows, command, results, console)
        show(given, command, results, console, words)
    return code


def _runs(table: PaperTable, default: TrainConfig, command: TableCommand) -> Runs:
    """Return a table's runs with what the command line changed in the settings of all tables."""
    config = command.config
    changed = {
        name: value
        for name in (field.name for field in fields(config))
        if (value := getattr(config, name)) != getattr(default, name)
    }
    runs = runs_of(table, replace(table.base, **changed), command.seeds or table.num_seeds)
    return {name: use_data_sets(run) for name, run in runs.items()}


def make_rows(rows: Sequence[Row], command: TableCommand, results: Path, console: Console) -> int:
    """Train and score rows one after another, those that are done excepted; return the exit code.

    Raises:
        RadioError: as `train_all`.
    """
    started = time.monotonic()
    left = [row for row in rows if command.restart or not is_done(row, results)]
    for row in left:  # all of them before the first is begun
        evaluation_settings(row)
        if not row.spec:
            check_settings(row.config, int(os.environ.get("WORLD_SIZE", "1")))
            check_tasks(row.config)
    say(console, f"{len(rows) - len(left)} of {len(rows)} rows are done, in {results}")
    failed = []
    for index, row in enumerate(left):
        minutes = (time.monotonic() - started) / 60
        if command.minutes is not None and minutes >= command.minutes:
            say(console, f"{minutes:.0f} minutes have passed; the same command goes on with {row.name}")
            return REQUEUE
        say(console, f"row {row.name} ({index + 1} of {len(left)})")
        state = make_row(row, results, console, restart=command.restart)
        if state == "stopped":
            return REQUEUE
        if state == "failed":
            failed.append(row.name)
    if failed:
        say(console, f"not all tasks of {', '.join(failed)} could be scored; the same command tries again")
    return int(bool(failed))


def make_row(row: Row, results: Path, console: Console, *, restart: bool) -> str:
    """Train and score one row; return `done`, `failed` (in a task) or `stopped` (by a signal)."""
    from radio.resources import choose_device

    fine: list[bool] = []

    def score(checkpoint: Path | None, ranks: Ranks, seconds: float) -> None:
        took = {"train": round(seconds, 1)} if checkpoint else {}
        screen = console if ranks.leads else Console(quiet=True)
        fine.append(score_row(row, checkpoint, results, screen, ranks, took))

    if row.spec:
        with join(choose_device(row.config.device)) as ranks:
            score(None, ranks, 0.0)
    else:
        started = time.monotonic()
        trained = train_all(
            {row.name: row.config},
            console,
            restart=restart,
            after=lambda checkpoint, ranks: score(checkpoint, ranks, time.monotonic() - started),
        )
        if trained.stopped:
            return "stopped"
    return "done" if all(fine) else "failed"


def _measure_speeds(
    given: Sequence[tuple[PaperTable, Runs]],
    rows: Sequence[Row],
    command: TableCommand,
    results: Path,
    console: Console,
) -> None:
    """Measure the speeds of the tables that show them, where that has not been done."""
    from .speed import measure_speed, read_speed

    for table, runs in given:
        if table.measures_speed and (command.restart or not read_speed(results, table.name)):
            say(console, f"{table.name}: measuring images per second")
            measure_speed(table, runs, results, console)


def show(
    given: Sequence[tuple[PaperTable, Runs]],
    command: TableCommand,
    results: Path,
    console: Console,
    words: str,
    *,
    write: bool = True,
) -> None:
    """Print the tables as far as their rows are done; write them as a file and as a page."""
    from .showing import FILE, as_markdown, collect, print_tables, write_tables
    from .weights import show_weights

    made = collect(given, results)
    print_tables(made, console)
    for table, runs in given:
        balanced = {name: run.out for name, run in runs.items() if run.balance.kind != "naive"}
        trained = {name: folder for name, folder in balanced.items() if (folder / LOG).is_file()}
        if trained and write:
            show_weights(trained, command.config.out / f"{table.name}-weights", console)
    if write:
        write_tables(made, results / FILE)
        if command.page is not None:
            write_text(command.page, as_markdown(made, words))

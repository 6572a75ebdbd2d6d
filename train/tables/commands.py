"""The command of a table: make its rows, collect them, plan them, or rehearse them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.reporting.paper_tables import read_tables
from radio.dist import Ranks
from radio.errors import ConfigError, RadioError, shown
from radio.io import check_file, check_writable, write_text
from radio.resources import choose_device

from ..commands import train_all
from ..config import RENAMED, TrainConfig
from ..distributed import REQUEUE, join
from ..loggers import LOG, say
from ..setup import check_settings
from ..tasks import check_data, check_paths, task_settings
from .layout import Runs, TableLayout, choose_runs, runs_of, without_seed
from .making import Row, evaluation_settings, is_done, rows_of, score_row
from .options import TableCommand
from .paper_size import use_data_sets
from .results import FILE, deciding_settings

_ROUNDED = frozenset({"resolution"})  # to a side that a row's student takes


def run_tables(
    tables: Sequence[TableLayout], default: TrainConfig, command: TableCommand, console: Console, words: str
) -> int:
    """Run the command of tables; return its exit code: 1 where a row failed, 85 where it was stopped.

    Args:
        tables: one, or all.
        default: the settings that the command line replaced some of.
        command: its options.
        console: where to print.
        words: the command, for the page.

    Raises:
        RadioError: a row or an option is unknown to the tables, its settings, data or weights do not fit, or
            a file cannot be written.
    """
    given = [_change_table(table, default, command) for table in tables]
    rows = rows_of(given)
    results = command.results or command.config.out / "results"
    _check(command, results)
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
    if command.collect:
        show(given, command, results, console, words)
        return 0
    with join(choose_device(command.config.device)) as ranks:
        screen = console if ranks.leads else Console(quiet=True)
        code = make_rows(rows, command, results, screen, ranks)
        if code == REQUEUE:
            return code

        def finish() -> bool:
            measured = bool(command.rows) or _measure_speeds(given, command, results, console)
            show(given, command, results, console, words)
            return measured

        measured = ranks.on_leader(finish)
    return code if measured else 1


def _check(command: TableCommand, results: Path) -> None:
    """Check that the options go together, and that what the command writes at its end can be written.

    Raises:
        ConfigError: they do not, or it cannot.
        DataError: the results' file of tables is damaged.
    """
    modes = [name for name in ("restart", "collect", "plan", "rehearse") if getattr(command, name)]
    if len(modes) > 1:
        raise ConfigError(f"--{' and --'.join(modes)} do not go together; give one of them")
    if command.collect and not results.is_dir():
        raise ConfigError(f"--results {shown(str(results))}: no such folder, and nothing to collect")
    if command.plan or command.rehearse:
        return
    check_writable(results, "--results" if command.results else "--out")
    if command.page is not None:
        check_file(command.page, "--page")
    if (path := results / FILE).is_file():
        read_tables(path)


def _change_table(
    table: TableLayout, default: TrainConfig, command: TableCommand
) -> tuple[TableLayout, Runs]:
    """Return a table, and its runs, with what the command line changed in the settings of all tables.

    Raises:
        ConfigError: a row or a task would not have a changed setting, which the table sets itself; or two
            rows would be the same run.
    """
    base = _change(table.base, default, command.config)
    chosen = {without_seed(row) for row in command.rows}
    runs = {name: run for name, run in table.make_runs(base).items() if not chosen or name in chosen}
    for name, run in runs.items():
        if lost := list(_lost(run, default, command.config)):
            raise ConfigError(
                f"{table.name} sets --{lost[0]} itself in row {name}, where the option would change nothing; "
                f"leave it out, or choose other rows by --rows"
            )
    for task, options in table.options.items():
        before, now = (task_settings(config, [task])[task] for config in (default, command.config))
        if lost := [name for name in options if getattr(before, name) != getattr(now, name)]:
            raise ConfigError(
                f"{table.name} sets --{task}.{lost[0].replace('_', '-')} itself, and the option would change "
                f"nothing; leave it out"
            )
    names: dict[str, str] = {}
    for name, run in runs.items():
        first = names.setdefault(json.dumps(deciding_settings(run)), name)
        if first != name:
            raise ConfigError(
                f"{table.name}: with these options the rows {first} and {name} are the same run; leave out "
                f"the option that makes them so, or choose one of them by --rows"
            )
    return replace(table, base=base), runs_of(table, base, command.seeds or table.num_seeds)


def _change(settings: Any, default: Any, changed: Any) -> Any:
    """Replace in settings what differs between two others, setting by setting, also in nested ones."""
    if default == changed:
        return settings
    if is_dataclass(settings) and type(settings) is type(default) is type(changed):
        names = [each.name for each in fields(settings)]
        return replace(
            settings,  # type: ignore[type-var]  # an instance, not a class
            **{
                name: _change(*(getattr(each, name) for each in (settings, default, changed)))
                for name in names
            },
        )
    if isinstance(changed, tuple) and len(settings) == len(default) == len(changed):
        return tuple(map(_change, settings, default, changed))
    if isinstance(changed, Mapping):
        return {**settings, **{name: own for name, own in changed.items() if own != default.get(name)}}
    return changed


def _lost(run: Any, default: Any, changed: Any, name: str = "") -> Iterator[str]:
    """Yield the options, such as `data.flip`, that were changed and that a run does not have so."""
    if default == changed or run == changed or name in _ROUNDED:
        return
    prefix = f"{name}." if name else ""
    if is_dataclass(changed) and type(run) is type(default) is type(changed):
        for each in fields(changed):
            option = prefix + RENAMED.get(each.name, each.name).replace("_", "-")
            own, before, after = (getattr(part, each.name) for part in (run, default, changed))
            yield from _lost(own, before, after, option)
    elif isinstance(changed, tuple) and len(run) >= len(default) == len(changed):
        for index, (own, before, after) in enumerate(zip(run, default, changed, strict=False)):
            yield from _lost(own, before, after, f"{prefix}{index}")
    elif not isinstance(changed, Mapping):
        yield name


def make_rows(
    rows: Sequence[Row], command: TableCommand, results: Path, console: Console, ranks: Ranks
) -> int:
    """Train and score rows one after another, those that are done excepted; return the exit code.

    Every rank takes part; the first decides what is done, and when the time is over. Where there is one rank,
    a row that cannot be made does not stop the others.

    Raises:
        RadioError: as `train_all`, where there are several ranks; or a row's settings or data do not fit.
    """
    started = time.monotonic()
    names = ranks.on_leader(
        lambda: [row.name for row in rows if command.restart or not is_done(row, results)]
    )
    left = [row for row in rows if row.name in names]
    for row in left:  # all of them before the first is begun
        settings = evaluation_settings(row)
        if not row.spec:
            use_data_sets(row.config, allow_pipes=command.allow_pipes)
            check_settings(row.config, ranks.world)
            check_data(row.config)
        check_paths(settings, row.config)
    say(console, f"{len(rows) - len(left)} of {len(rows)} rows are done, in {results}")
    failed = []
    for index, row in enumerate(left):
        minutes = ranks.on_leader(lambda: (time.monotonic() - started) / 60)
        if command.minutes is not None and minutes >= command.minutes:
            say(console, f"{minutes:.0f} minutes have passed; the same command goes on with {row.name}")
            return REQUEUE
        say(console, f"row {row.name} ({index + 1} of {len(left)})")
        try:
            state = make_row(
                row, results, console, ranks, restart=command.restart, allow_pipes=command.allow_pipes
            )
        except RadioError as error:
            if ranks.world > 1:  # the other ranks may not have met it
                raise
            say(console, f"{row.name}: {error}")
            state = "failed"
        if state == "stopped":
            return REQUEUE
        if state == "failed":
            failed.append(row.name)
    if failed:
        say(console, f"not all of {', '.join(failed)} could be made; the same command tries again")
    return int(bool(failed))


def make_row(
    row: Row, results: Path, console: Console, ranks: Ranks, *, restart: bool, allow_pipes: bool
) -> str:
    """Train and score one row; return `done`, `failed` (in a task) or `stopped` (by a signal).

    Raises:
        RadioError: as `train_all`.
    """
    fine: list[bool] = []

    def score(checkpoint: Path | None, group: Ranks, took: Mapping[str, float]) -> None:
        fine.append(score_row(row, checkpoint, results, console, group, took, restart=restart))

    if row.spec:
        score(None, ranks, {})
    else:
        started = time.monotonic()
        trained = train_all(
            {row.name: use_data_sets(row.config, allow_pipes=allow_pipes)},
            console,
            restart=restart,
            after=lambda checkpoint, group: score(
                checkpoint, group, {"train": round(time.monotonic() - started, 1)}
            ),
        )
        if trained.stopped:
            return "stopped"
    return "done" if all(fine) else "failed"


def _measure_speeds(
    given: Sequence[tuple[TableLayout, Runs]], command: TableCommand, results: Path, console: Console
) -> bool:
    """Measure the speeds of the tables that show them, where none are; return whether all could be."""
    from .speed import measure_speed, read_speed

    failed = False
    for table, runs in given:
        if table.measures_speed and (command.restart or not read_speed(results, table.name)):
            say(console, f"{table.name}: measuring images per second")
            try:
                measure_speed(table, runs, results, console)
            except RadioError as error:  # the tables are shown without them
                failed = True
                say(console, f"{table.name}: no images per second: {error}")
    return not failed


def show(
    given: Sequence[tuple[TableLayout, Runs]],
    command: TableCommand,
    results: Path,
    console: Console,
    words: str,
    *,
    write: bool = True,
) -> None:
    """Print the tables as far as their rows are done; write them as a file and as a page."""
    from .showing import as_markdown, collect, print_tables, write_tables
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

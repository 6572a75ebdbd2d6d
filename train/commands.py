"""The commands of `radio-train`: train runs one after another, a table's rows, or print a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import tyro
from rich.console import Console

from radio.config import check_options, parse_options, read_yaml
from radio.dist import Ranks
from radio.errors import ConfigError
from radio.resources import choose_device, collect, locked
from radio.students import options_type, students

from .cli import is_file
from .config import RENAMED, TrainConfig
from .data.shards import runs_program
from .distributed import REQUEUE, join
from .loggers import say
from .plan import PlanOptions, make_plan, print_plan
from .recipes import recipes
from .setup import check_settings, round_resolutions
from .tables import PaperTable, Rows, rows_of, tables
from .trainer import Trainer

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """Options of one run."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    restart: bool = False  # start over and ignore the state in the run folder
    yes: bool = False  # write a teacher cache of any size without confirmation


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCommand(Command):
    """Options of one run whose settings come from a file."""

    allow_pipes: bool = False  # run the file's shard commands (pipe:COMMAND)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCommand:
    """Options of a plan and of the run it describes."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    options: Annotated[PlanOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCommand:
    """Options of all runs of a table."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    rows: tuple[str, ...] = ()  # only these rows of the table; () = all
    restart: bool = False  # start every row over


def run(name: str, options: Sequence[str], console: Console) -> int:
    """Train one run, then score its checkpoint if the settings say so; return the exit code.

    Raises:
        RadioError: a setting is unknown, data or weights are missing, or the run cannot continue.
    """
    command = _command(name, options)
    config = command.config
    if command.yes:
        config = replace(config, cache=replace(config.cache, confirm=False))
    trained = train_all({name: config}, console, restart=command.restart)
    if trained.stopped:
        return REQUEUE
    if trained.leads and config.score:
        from .scoring import score

        score(config, {"student": trained.checkpoints[name]}, config.out / "reports", console)
    return 0


def _command(name: str, options: Sequence[str]) -> Command:
    """Parse the command line of one run.

    Raises:
        ConfigError: the settings file's shards would run a command without --allow-pipes.
    """
    if not is_file(name):
        return _parse(Command, Command(config=_with_student(_settings(name), options)), options, name)
    command = _parse(FileCommand, FileCommand(config=_with_student(_settings(name), options)), options, name)
    typed = any(option.partition("=")[0] == "--data.shards" for option in options)
    for pattern in () if typed or command.allow_pipes else command.config.data.shards:
        if (program := runs_program(pattern)) is not None:
            raise ConfigError(
                f"{name}: data.shards would run the command {program!r}; "
                f"where you trust it, add --allow-pipes, or else give your own --data.shards"
            )
    return command


def plan(name: str, options: Sequence[str], console: Console) -> int:
    """Print the plan of a recipe, a file of settings or a table's rows; return the exit code 0."""
    table = tables[name]() if name in tables else None
    config = _with_student(table.base if table else _settings(name), options)
    default = PlanCommand(config=config, options=PlanOptions())
    command = _parse(PlanCommand, default, options, f"{name} --plan")
    check_options(command.config, RENAMED)
    runs = table.rows(command.config) if table else {name: command.config}
    for run in runs.values():
        check_tasks(run)
        config, changes = round_resolutions(run)
        for line in changes:
            say(console, line)
        print_plan(make_plan(config, command.options), console)
    return 0


def make_table(name: str, options: Sequence[str], console: Console) -> int:
    """Train the rows of a table with command-line overrides and return the exit code."""
    table = tables[name]()
    command = _parse(TableCommand, TableCommand(config=_with_student(table.base, options)), options, name)
    rows = rows_of(table, check_options(command.config, RENAMED), command.rows)
    trained = sweep(table, rows, command.config.out, console, restart=command.restart)
    return REQUEUE if trained.stopped else 0


def _settings(name: str) -> TrainConfig:
    return read_yaml(TrainConfig, Path(name)) if is_file(name) else recipes[name]()


def _with_student(config: TrainConfig, options: Sequence[str]) -> TrainConfig:
    """Give the settings the student named among command-line options, and its family's options."""
    name = config.student
    for i, option in enumerate(options):
        if option == "--student" and i + 1 < len(options):
            name = options[i + 1]
        elif option.startswith("--student="):
            name = option.partition("=")[2]
    if name not in students:  # an unknown name is reported later
        return config
    kind = options_type(name)
    given = config.options
    if type(given) is not kind:
        given = kind(activation_checkpointing=given.activation_checkpointing)
    return replace(config, student=name, options=given)


def _parse(type_: type[S], default: S, options: Sequence[str], name: str) -> S:
    return parse_options(type_, options, default=default, prog=f"radio-train {name}")


class TrainedRows(NamedTuple):
    """Result of some runs."""

    checkpoints: dict[str, Path]
    stopped: bool  # by a signal: the last of them is not finished
    leads: bool  # whether this is the first rank, which does the rest


def train_all(runs: Rows, console: Console, *, restart: bool = False) -> TrainedRows:
    """Train runs of one device one after another; each resumes where it was stopped.

    Args:
        runs: their settings by name.
        console: where the first rank reports.
        restart: start every run over.

    Raises:
        RadioError: a run failed; errors in the settings are raised before the first run.
    """
    checkpoints: dict[str, Path] = {}
    with join(device := choose_device(next(iter(runs.values())).device)) as group:
        for config in runs.values():
            check_settings(config, group.world)
            check_tasks(config)
        screen = console if group.leads else Console(quiet=True)
        for name, given in runs.items():
            config, changes = round_resolutions(given)
            for line in changes:
                say(screen, line)
            with _alone(config.out, group):
                run = Trainer(config, group, device, screen, restart=restart)
                checkpoints[name] = run.train()
            if run.stopped:
                line = f"stopped after step {run.step} of {config.out}; the same command goes on from there"
                say(screen, line)
                return TrainedRows(checkpoints, stopped=True, leads=group.leads)
            say(screen, f"checkpoint: {checkpoints[name]}")
            del run
            collect()  # frees reference cycles of the run, for the next model's memory
    return TrainedRows(checkpoints, stopped=False, leads=group.leads)


def check_tasks(config: TrainConfig) -> None:
    """Check that the run can provide the settings that its evaluators require."""
    if tasks := (*config.score, *(config.eval_tasks if config.eval_every else ())):
        from .scoring import make_job  # imported late: it imports all evaluators

        for task in tasks:
            make_job(task)


@contextmanager
def _alone(folder: Path, group: Ranks) -> Iterator[None]:
    """Lock a run folder against other trainers; the first rank does it, and all get the result.

    Raises:
        RadioError: another trainer has locked it.
    """
    with ExitStack() as held:
        group.on_leader(lambda: held.enter_context(locked(folder, "trained")))
        yield


def sweep(
    table: PaperTable, runs: Rows, out: Path, console: Console, *, restart: bool = False
) -> TrainedRows:
    """Train rows of a table, from `rows_of`; once all are finished, compare their checkpoints.

    Raises:
        RadioError: as `train_all`.
    """
    trained = train_all(runs, console, restart=restart)
    if trained.leads and not trained.stopped:
        table.compare(runs, trained.checkpoints, out, console)
    return trained

"""radio-train: run a recipe or a saved config.yaml with command-line overrides.

Usage, options and errors about names come without torch, whose import takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console

from radio.config import check_options, parse_options, read_yaml
from radio.errors import ConfigError, did_you_mean
from radio.students import StudentOptions, options_type, students

from .config import RENAMED, PlanOptions, TrainConfig
from .recipes import recipes
from .tables import NAMES, describe_table, make_tables
from .tables.layout import Size
from .tables.options import TableCommand
from .tasks import find_tasks, required_settings, scored_tasks, settings_type

USAGE = """usage: radio-train RECIPE [--section.option value ...] [--restart]
       radio-train RECIPE --plan [--world RANKS] [--peak-tflops NUMBER] ...
       radio-train runs/NAME/config.yaml [--out runs/OTHER] ...

One run of distillation. Repeat the command to go on where it was stopped. --plan runs nothing: it prints
which ranks do what, the memory they need, and what the run costs.
`radio-train RECIPE --help` lists every option with the recipe's value, also those of the tasks that it scores
(--knn.bank), which --score and --eval-tasks name. Recipes:
"""
PLAN = "--plan"
# Names of the run's own options; a task of another package that is called like one has options in files only.
_SECTIONS = {RENAMED.get(setting.name, setting.name) for setting in fields(TrainConfig)}


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


C = TypeVar("C", Command, FileCommand, PlanCommand, TableCommand)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `radio-train`; return its exit code: 0 done, 2 usage, 85 stopped, to be started again.

    Raises:
        RadioError: a recipe or setting is unknown, data or weights are missing, or the run cannot continue.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(USAGE + _listing(), markup=False, highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    name, options = arguments[0], arguments[1:]
    _check_name(name)
    if name in NAMES:
        return _make_tables(name, options, console)
    if PLAN in options:
        return _plan(name, [option for option in options if option != PLAN], console)
    return _run(name, options, console)


def _check_name(name: str) -> None:
    """Check that the first word is a file of settings, a recipe or a table."""
    if _is_file(name) or name in recipes or name in NAMES:
        return
    if name.startswith("-"):
        raise ConfigError(
            f"the first word is a recipe or a config.yaml, got {name!r}; recipes: {', '.join(recipes)}"
        )
    known = [*recipes, *NAMES]
    hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
    raise ConfigError(f"unknown recipe {name!r}{hint}")


def _is_file(name: str) -> bool:
    """Check whether the first word names a file of settings."""
    return name.endswith((".yaml", ".yml"))


def _run(name: str, options: Sequence[str], console: Console) -> int:
    """Train one run; return the exit code."""
    command = _command(name, options)
    config = command.config
    if command.yes:
        config = replace(config, cache=replace(config.cache, confirm=False))
    from .commands import run

    return run(name, config, console, restart=command.restart)


def _command(name: str, options: Sequence[str]) -> Command:
    """Parse the command line of one run.

    Raises:
        ConfigError: the settings file's shards would run a command without --allow-pipes.
    """
    if not _is_file(name):
        return _parse(Command, Command(config=_with_student(_settings(name), options)), options, name)
    command = _parse(FileCommand, FileCommand(config=_with_student(_settings(name), options)), options, name)
    from .data.shards import runs_program

    typed = any(option.partition("=")[0] == "--data.shards" for option in options)
    for pattern in () if typed or command.allow_pipes else command.config.data.shards:
        if (program := runs_program(pattern)) is not None:
            raise ConfigError(
                f"{name}: data.shards would run the command {program!r}; "
                f"where you trust it, add --allow-pipes, or else give your own --data.shards"
            )
    return command


def _plan(name: str, options: Sequence[str], console: Console) -> int:
    """Print the plan of a recipe or of a file of settings; return the exit code 0."""
    config = _with_student(_settings(name), options)
    default = PlanCommand(config=config, options=PlanOptions())
    command = _parse(PlanCommand, default, options, f"{name} --plan")
    check_options(command.config, RENAMED)
    from .commands import plan

    return plan({name: command.config}, command.options, console)


def _make_tables(name: str, options: Sequence[str], console: Console) -> int:
    """Make a table, or all, with command-line overrides; return the exit code."""
    words = _words_after("--size", options) or ["small"]
    size: Size = "paper" if words[:1] == ["paper"] else "small"  # anything else is refused by the parser
    tables = make_tables(name, size)
    tasks = tuple(dict.fromkeys(task for table in tables for task in table.base.score))
    default = replace(tables[0].base, score=tasks)
    config = _with_student(default, options)
    command = _parse(TableCommand, TableCommand(config=config), options, name)
    check_options(command.config, RENAMED)
    check_options(command)
    from .tables.commands import run_tables

    return run_tables(tables, default, command, console, " ".join(["radio-train", name, *options]))


def _settings(name: str) -> TrainConfig:
    return read_yaml(TrainConfig, Path(name)) if _is_file(name) else recipes[name]()


def _with_student(config: TrainConfig, options: Sequence[str]) -> TrainConfig:
    """Give the settings the student named among command-line options, and its family's options.

    Settings that have their student's own options already, as our recipes, need no look at the students.
    """
    name = (_words_after("--student", options) or [config.student])[0]
    if name == config.student and type(config.options) is not StudentOptions:
        return config
    if name not in students:  # an unknown name is reported later
        return config
    kind = options_type(name)
    given = config.options
    if type(given) is not kind:
        given = kind(activation_checkpointing=given.activation_checkpointing)
    return replace(config, student=name, options=given)


def _parse(type_: type[C], default: C, options: Sequence[str], name: str) -> C:
    """Parse the options of a command, and those of each task that its run scores (`--knn.bank`).

    The run's settings then have the tasks that they had before, and those that an option names.

    Raises:
        ConfigError: a task is unknown, or an option names one that the run does not score.
    """
    config = default.config
    scored = _tasks_to_score(config, options)
    kinds = {task: settings_type(task) for task in scored if task not in _SECTIONS}
    given = {**dict.fromkeys(config.tasks, ""), **_tasks_of(options)}
    for task, option in given.items():
        if option and task not in kinds:
            raise ConfigError(
                f"{option}: this run does not score {task}; add it to --score, or to --eval-tasks beside "
                f"--eval-every, or leave the option out"
            )
    asks_help = not {"-h", "--help"}.isdisjoint(options)
    groups: list[Any] = [("command", Annotated[type_, tyro.conf.arg(name="")], field(default=default))]
    for index, (task, kind) in enumerate(kinds.items()):
        if task not in given and not asks_help and required_settings(task):
            continue  # told later, in one line
        groups.append((f"task_{index}", Annotated[kind, tyro.conf.arg(name=task)]))
        if task in config.tasks:
            groups[-1] += (field(default_factory=partial(config.tasks.get, task)),)
    both = make_dataclass("Both", groups, frozen=True, kw_only=True)
    parsed: Any = parse_options(both, options, prog=f"radio-train {name}", description=type_.__doc__)
    read = {task: getattr(parsed, f"task_{index}") for index, task in enumerate(kinds) if task in given}
    command: C = parsed.command
    return replace(command, config=replace(command.config, tasks={**config.tasks, **read}))


def _tasks_to_score(config: TrainConfig, options: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks that a run scores with these command-line options over its settings."""
    score, tasks = _words_after("--score", options), _words_after("--eval-tasks", options)
    every = (_words_after("--eval-every", options) or [str(config.eval_every)])[0]
    with suppress(ValueError):  # what is no number is reported later
        config = replace(config, eval_every=int(every))
    if score is not None:
        config = replace(config, score=tuple(score))
    if tasks is not None:
        config = replace(config, eval_tasks=tuple(tasks))
    return scored_tasks(config)


def _tasks_of(options: Sequence[str]) -> dict[str, str]:
    """Return the tasks that command-line options name, with an option of each."""
    found: dict[str, str] = {}
    for option in options:
        name = option.partition("=")[0]
        prefix, dot, _ = name.removeprefix("--").partition(".")
        if name.startswith("--") and dot and prefix not in _SECTIONS:
            found |= dict.fromkeys(find_tasks(prefix), name)
    return found


def _words_after(name: str, options: Sequence[str]) -> list[str] | None:
    """Return the words after a command-line option where it stands last; None where it is absent."""
    found = None
    for index, option in enumerate(options):
        head, equals, value = option.partition("=")
        if option.startswith("--") and head.replace("_", "-") == name:
            words = takewhile(lambda word: not word.startswith("-"), options[index + 1 :])
            found = [*([value] if equals else []), *words]
    return found


def _listing() -> str:
    described = {name: recipes[name].__doc__ for name in recipes}
    described |= {name: describe_table(name) for name in NAMES}
    return "\n".join(f"  {name:<20}{(text or '').splitlines()[0]}" for name, text in described.items())

"""`radio-eval`: score any model on any task.

radio-eval knn runs/demo/ckpt.pt scenes:clip --k 10 20
radio-eval list --archs

Usage, options and errors about names come without torch, whose import takes seconds; what runs is imported
when it is called.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from annotated_types import Interval
from rich.console import Console
from rich.markup import escape

from radio.config import AttentionWindow, Seed, check, parse_options
from radio.datasets import read_data_sets
from radio.errors import ConfigError, did_you_mean, shown
from radio.specs import check_spec
from radio.students import students

from .core import evaluators
from .core.task import OWN, Evaluator, RunSettings, late, make_evaluator, missing_data, name_job, settings_on
from .reporting import CompareOptions, LeaderboardOptions, ReportOptions, TrendOptions
from .throughput import ThroughputOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run `radio-eval` and return its exit code: 0 when every report was written.

    Raises:
        RadioError: anything that the user can correct (the console script prints it and exits with 2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_usage(Console())
        return 0
    task, *rest = arguments
    if task in _COMMANDS:
        return _COMMANDS[task](rest)
    if task not in evaluators:
        known = list(dict.fromkeys([*evaluators, *_COMMANDS]))
        hint = did_you_mean(task, known) or f"; it has {', '.join(known)}"
        raise ConfigError(f"radio-eval has no command {task!r}{hint}")
    return _evaluate(task, rest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options that every task accepts."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Checkpoint files, or specs such as scenes:clip, dinov2:vitb14@FILE, pip:efficientnet-lite0."""
    arch: str | None = None
    """Instead of MODELS: this architecture's newest checkpoint under runs/, or none with --random-init."""
    random_init: bool = False
    """Score the untrained architecture, as a baseline."""
    init_seed: Seed = 0
    """Seed of the weights of --random-init."""
    window: tuple[AttentionWindow, ...] = ()
    """Side of the attention windows in tokens, for students that have windows, or global: a ViT with global
    attention in every block. Each value adds a column."""
    out: Path | None = None
    """Folder of the reports. Default: reports/ beside a checkpoint, else ./reports."""
    plain: bool = False
    """Print without progress bars, colours and box lines."""


def _evaluate(task: str, arguments: Sequence[str]) -> int:
    evaluator = make_evaluator(task)
    own = task.replace("-", "_")  # tyro prints the fields' names above their flags
    groups: list[Any] = [
        ("model", _flat(Options)),
        ("run", _flat(RunSettings)),
        (own, _flat(evaluator.settings)),
    ]
    parsed: Any = parse_options(
        dataclasses.make_dataclass("Arguments", groups, frozen=True, kw_only=True),
        arguments,
        prog=f"radio-eval {task}",
        description=_summary(task),
    )
    options, run, settings = check(parsed.model), parsed.run, check(getattr(parsed, own))
    _check_models(options)
    placed = {OWN: settings}
    if run.data_root is not None:
        placed = settings_on(evaluator, settings, read_data_sets(run.data_root))
        if not placed:
            raise ConfigError(f"{task}: {missing_data(evaluator, settings, run.data_root)}")
    from .commands import evaluate

    return evaluate(evaluator, options, run, placed)


def _flat(group: Any) -> Any:
    """Leave a group's name out of its options; only groups inside it keep theirs, as in --knn.k."""
    if any(dataclasses.is_dataclass(hint) for hint in get_type_hints(group).values()):
        return Annotated[group, tyro.conf.arg(name="")]
    flat: Any = tyro.conf.OmitArgPrefixes
    return flat[group]


def _check_models(options: Options) -> None:
    """Check the models' names before torch is imported.

    Raises:
        ConfigError, CheckpointError: as `radio.specs.check_spec`.
    """
    if options.arch is None:
        for text in options.models:
            check_spec(text, random_init=options.random_init)
    elif options.arch not in students:
        students[options.arch]  # raises, with the nearest names


@dataclass(frozen=True, kw_only=True, slots=True)
class AllOptions:
    """Run every task whose requirements a model meets."""

    tasks: tuple[str, ...] = ()
    """Only these tasks. Default: all scores (throughput is measured only when it is named)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseOptions(AllOptions):
    """Measure the seed variance of a model's scores; compare reads the resulting file."""

    repeats: Annotated[int, Interval(ge=0, le=1000)] = 5
    """Number of runs of each task that trains something."""


def _parse_suite(
    command: str, kind: type[AllOptions], arguments: Sequence[str]
) -> tuple[Options, Any, RunSettings, dict[str, tuple[Evaluator[Any], Any]]]:
    """Parse the common options, the command's own, and the settings of each task (`--TASK.option`).

    A task of another package that cannot be made, or whose data sets a data root has not, is left out with a
    warning, unless it is named.
    """
    made: dict[str, Evaluator[Any]] = {}
    failed: dict[str, ConfigError] = {}
    for name in evaluators:
        try:
            made[name] = make_evaluator(name)
        except ConfigError as error:
            failed[name] = error
    groups: list[Any] = [("model", Options), ("own", kind), ("run", RunSettings)]
    fields: list[Any] = [(name, Annotated[group, tyro.conf.arg(name="")]) for name, group in groups]
    fields += [(name.replace("-", "_"), evaluator.settings) for name, evaluator in made.items()]
    both = dataclasses.make_dataclass("Suite", fields, frozen=True, kw_only=True)
    parsed: Any = parse_options(both, arguments, prog=f"radio-eval {command}", description=kind.__doc__)
    for task in parsed.own.tasks:
        if task in failed:
            raise failed[task]
        if task not in made:
            raise ConfigError(f"no task {task!r}{did_you_mean(task, made)}; tasks: {', '.join(made)}")
    if not parsed.own.tasks:
        for problem in failed.values():
            _leave_out(str(problem))
    chosen = parsed.own.tasks or [name for name in made if not made[name].on_request]
    jobs = {name: (made[name], check(getattr(parsed, name.replace("-", "_")))) for name in chosen}
    options, root = check(parsed.model), parsed.run.data_root
    _check_models(options)
    if root is not None:
        jobs = _on_data_sets(jobs, root, named=bool(parsed.own.tasks))
    return options, check(parsed.own), parsed.run, jobs


def _leave_out(reason: str) -> None:
    Console(stderr=True).print(escape(f"left out: {reason}"), soft_wrap=True, highlight=False)


def _on_data_sets(
    jobs: Mapping[str, tuple[Evaluator[Any], Any]], root: Path, *, named: bool
) -> dict[str, tuple[Evaluator[Any], Any]]:
    """Run each task on the data sets of a data root; one without any is left out, or an error if `named`."""
    sets, placed = read_data_sets(root), dict[str, tuple[Evaluator[Any], Any]]()
    for task, (evaluator, settings) in jobs.items():
        settings_of = settings_on(evaluator, settings, sets)
        placed |= {name_job(task, name): (evaluator, each) for name, each in settings_of.items()}
        if not settings_of:
            lack = f"{task}: {missing_data(evaluator, settings, root)}"
            if named:
                raise ConfigError(lack)
            _leave_out(lack)
    if not placed:
        raise ConfigError(f"{shown(root)}: has no data set that a task is scored on; name one there")
    return placed


def _all(arguments: Sequence[str]) -> int:
    options, _, run, jobs = _parse_suite("all", AllOptions, arguments)
    from .commands import evaluate_all

    return evaluate_all(options, run, jobs)


def _noise(arguments: Sequence[str]) -> int:
    options, own, run, jobs = _parse_suite("noise", NoiseOptions, arguments)
    from .commands import evaluate_noise

    return evaluate_noise(options, run, jobs, own.repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """List the tasks that models are scored on."""

    archs: bool = False
    """List the architectures instead, with their parameters and multiply-adds."""
    models: bool = False
    """List the kinds of models instead, and how each is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """List your data sets: what each is, where, and whether it is there."""

    data_root: Path = Path()
    """A data.yaml that names your data sets, or a folder that has them. Default: this folder."""
    check: bool = False
    """Look inside, as the evaluators do: count images, classes, shards and records, and name what is missing
    or laid out wrong. No image is decoded."""
    plain: bool = False
    """Print without progress bars, colours and box lines."""


def _data(arguments: Sequence[str]) -> int:
    options = check(parse_options(DataOptions, arguments, prog="radio-eval data"))
    sets = read_data_sets(options.data_root)
    from .datasets import list_data_sets

    return list_data_sets(sets, check=options.check, plain=options.plain)


def _list(arguments: Sequence[str]) -> int:
    console = Console(highlight=False)
    options = parse_options(ListOptions, arguments, prog="radio-eval list")
    if options.archs or options.models:
        from .tables import print_architectures, print_models

        if options.models:
            print_models(console)
        if options.archs:
            print_architectures(console)
    else:
        _print_tasks(console)
    return 0


def _throughput(arguments: Sequence[str]) -> int:
    options = check(
        parse_options(
            ThroughputOptions,
            arguments,
            prog="radio-eval throughput",
            description="Images a second, multiply-adds and memory of several models, measured alternately.",
        )
    )
    from .reporting.figures import draw_tradeoff
    from .throughput.evaluator import run_throughput

    return run_throughput(options, partial(draw_tradeoff, task="knn"))


def _reporting(command: str, kind: type[Any], arguments: Sequence[str]) -> int:
    options = check(parse_options(kind, arguments, prog=f"radio-eval {command}"))
    code: int = late(f"evals.reporting.command:run_{command}")(options)
    return code


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "all": _all,
    "noise": _noise,
    "list": _list,
    "data": _data,
    "throughput": _throughput,
    "compare": partial(_reporting, "compare", CompareOptions),
    "report": partial(_reporting, "report", ReportOptions),
    "trend": partial(_reporting, "trend", TrendOptions),
    "leaderboard": partial(_reporting, "leaderboard", LeaderboardOptions),
}

_USAGE = """\
usage: radio-eval TASK MODEL... [options]
       radio-eval all MODEL... [--tasks ...] [--TASK.option ...]
       radio-eval noise MODEL [--repeats N] [--tasks ...]
       radio-eval throughput MODEL... [--reference MODEL]
       radio-eval list [--archs] [--models]
       radio-eval data [--data-root DATA] [--check]
       radio-eval report REPORTS --html PAGE [--run runs/NAME]
       radio-eval compare REPORTS --baseline REPORTS [options]
       radio-eval trend NIGHTS --html PAGE
       radio-eval leaderboard REPORTS... [--tasks ...] [--html PAGE]
"""


def _print_usage(console: Console) -> None:
    console.print(_USAGE, markup=False, highlight=False)
    _print_tasks(console)
    console.print("\nradio-eval TASK --help prints a task's options.", highlight=False)


def _print_tasks(console: Console) -> None:
    for name in evaluators:
        console.print(f"{name:12} {_summary(name)}", markup=False, highlight=False)


def _summary(name: str) -> str:
    return (evaluators[name].__doc__ or "").strip().split("\n")[0]

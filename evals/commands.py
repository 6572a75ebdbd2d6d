"""The commands of `radio-eval` that score models: one task, all tasks, and the noise of the scores."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from annotated_types import Interval
from rich.console import Console
from rich.markup import escape

from radio.checkpoint import load as load_checkpoint
from radio.config import Pixels, Seed, check, parse_options
from radio.dist import Ranks, joined
from radio.errors import CheckpointError, ConfigError, did_you_mean
from radio.hub import load_backbone
from radio.io import check_writable
from radio.progress import ProgressFactory, watch_on
from radio.resources import choose_device
from radio.students import students
from radio.types import Backbone

from .core import evaluators
from .core.evaluator import Evaluator, RunSettings, make_evaluator, run_evaluator, run_predictions
from .core.report import Kind
from .core.suite import NOISE_FILE, Jobs, measure_noise, run_all, write_noise
from .tables import comparison, summary


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options that every task accepts."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Checkpoint files, or specs such as scenes:clip, dinov2:vitb14@FILE, pip:efficientnet-lite0."""
    arch: str | None = None
    """Instead of MODELS: this architecture's newest checkpoint under runs/, or none with --random-init."""
    random_init: bool = False
    """Score the untrained architecture, as the lower bound of every table."""
    init_seed: Seed = 0
    """Seed of the weights of --random-init."""
    window: tuple[Pixels, ...] = ()
    """Side of the attention windows in tokens, for students that have windows; each value adds a column."""
    out: Path | None = None
    """Folder of the reports. Default: reports/ beside a checkpoint, else ./reports."""
    plain: bool = False
    """Print without progress bars, colours and box lines."""


def _joined(run: RunSettings) -> AbstractContextManager[Ranks]:
    """Join the ranks: small arrays are sent over gloo, and what a task shards over GPUs over NCCL.

    Each rank selects its GPU first: FSDP, NCCL and accelerate would otherwise all use the first one.
    """
    if "WORLD_SIZE" in os.environ and run.device != "cpu":
        device = choose_device(run.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            return joined("cpu:gloo,cuda:nccl")
    return joined()


def evaluate(task: str, arguments: Sequence[str]) -> int:
    """Score models on a task; return the exit code 0."""
    evaluator = make_evaluator(task)
    own = task.replace("-", "_")  # tyro prints the fields' names above their flags
    groups: list[Any] = [("model", Options), ("run", RunSettings), (own, evaluator.settings)]
    parsed: Any = parse_options(
        dataclasses.make_dataclass("Arguments", groups, frozen=True, kw_only=True),
        arguments,
        prog=f"radio-eval {task}",
        description=(evaluators[task].__doc__ or "").strip().split("\n")[0],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    options, run, settings = check(parsed.model), parsed.run, check(getattr(parsed, own))
    with _joined(run) as group:
        console, progress = _screen(options, group)
        _check_out(options)
        reports = []
        if not options.models and options.arch is None:
            report = run_predictions(evaluator, settings, options.out or Path("reports"), run=run)
            reports += [] if report is None else [report]
        for spec, model, name in () if reports else _models(options):
            report = run_evaluator(
                evaluator,
                model,
                settings,
                options.out or _default_out(spec),
                run=run,
                name=name,
                kind=_kind(options, spec),
                ranks=group,
                progress=progress,
            )
            reports.append(report)
        console.print(comparison(reports, plain=options.plain))
        for report in reports:
            skipped = [
                f"{len(used.skipped)} images of {used.name} could not be read and were left out; the first: "
                f"{used.skipped[0].key}: {used.skipped[0].reason}"
                for used in report.data
                if used.skipped
            ]
            for note in (*report.notes, *skipped):
                console.print(escape(f"{report.model}: {note}"))
    return 0


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
) -> tuple[Options, Any, RunSettings, Jobs]:
    """Parse the common options, the command's own, and the settings of each task (`--TASK.option`).

    A task of another package that cannot be made is left out with a warning, unless it is named.
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
            Console(stderr=True).print(escape(f"left out: {problem}"), soft_wrap=True, highlight=False)
    chosen = parsed.own.tasks or [name for name in made if not made[name].on_request]
    jobs = {name: (made[name], check(getattr(parsed, name.replace("-", "_")))) for name in chosen}
    return check(parsed.model), check(parsed.own), parsed.run, jobs


def evaluate_all(arguments: Sequence[str]) -> int:
    """Run all tasks; return the exit code: 1 when a task failed, else 0."""
    options, _, run, jobs = _parse_suite("all", AllOptions, arguments)
    failed = False
    with _joined(run) as group:
        console, progress = _screen(options, group)
        _check_out(options)
        for spec, model, name in _models(options):
            outcomes = run_all(
                model,
                jobs,
                options.out or _default_out(spec),
                run=run,
                name=name,
                kind=_kind(options, spec),
                progress=progress,
                ranks=group,
                log=_logger(console, name),
            )
            console.print(summary(name, outcomes, plain=options.plain))
            failed = failed or any(outcome.state == "failed" for outcome in outcomes)
    return int(failed)


def evaluate_noise(arguments: Sequence[str]) -> int:
    """Measure the noise of a model's scores; return the exit code 0."""
    options, own, run, jobs = _parse_suite("noise", NoiseOptions, arguments)
    console, progress = _screen(options, Ranks())
    _check_out(options)
    for spec, model, name in _models(options):
        log = _logger(console, name)
        noise = measure_noise(
            model, jobs, run=run, repeats=own.repeats, name=name, progress=progress, log=log
        )
        path = (options.out or _default_out(spec)) / NOISE_FILE
        write_noise(path, noise, fingerprint=model.fingerprint, repeats=own.repeats)
        for task, metrics in noise.items():
            log(f"{task}: " + ", ".join(f"{metric} {value:.2f}" for metric, value in metrics.items()))
        console.print(str(path), soft_wrap=True)
    return 0


def _screen(options: Options, group: Ranks) -> tuple[Console, ProgressFactory]:
    """Return the console for results and the factory of progress bars."""
    console = Console(no_color=options.plain, highlight=False, quiet=not group.leads)
    progress = Console(stderr=True)
    return console, watch_on(progress, shown=group.leads and progress.is_terminal and not options.plain)


def _logger(console: Console, name: str) -> Callable[[str], None]:
    return lambda line: console.print(escape(f"{name}: {line}"), soft_wrap=True)


def _kind(options: Options, spec: str) -> Kind | None:
    """Return `untrained` for a model of random weights; None where the model itself says what it is."""
    return "untrained" if options.random_init or spec.startswith("arch:") else None


def _models(options: Options) -> Iterator[tuple[str, Backbone, str]]:
    """Yield each model, loaded only when it is needed, with its spec and a unique name."""
    specs = list(options.models)
    if options.arch is not None:
        if specs:
            raise ConfigError(
                f"--arch {options.arch} stands instead of a model; leave {specs[0]} or --arch out"
            )
        specs = [options.arch if options.random_init else str(_newest_checkpoint(options.arch))]
    if not specs:
        raise ConfigError("no model was named; give a checkpoint file, a spec such as scenes:clip, or --arch")
    names: set[str] = set()
    for spec in specs:
        for window in options.window or (None,):
            model = load_backbone(
                spec, random_init=options.random_init, seed=options.init_seed, window=window
            )
            yield spec, model, _new_name(model.name, spec, options, window, names)


def _new_name(name: str, spec: str, options: Options, window: int | None, taken: set[str]) -> str:
    if _kind(options, spec) == "untrained" and not name.endswith("-untrained"):
        name = f"{name}-untrained"
    if window is not None:
        name = f"{name}-window{window}"
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    taken.add(unique)
    return unique


def _check_out(options: Options) -> None:
    """Check that the reports can be written, before the work rather than after it."""
    for spec in options.models or (options.arch or "",):
        check_writable(options.out or _default_out(spec), "--out")


def _default_out(spec: str) -> Path:
    path = Path(spec)
    return path.parent / "reports" if path.is_file() else Path("reports")


def _newest_checkpoint(arch: str, root: Path = Path("runs")) -> Path:
    students[arch]  # an unknown name raises here, with the nearest ones
    checkpoints = sorted(root.glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in checkpoints:
        if load_checkpoint(path).metadata.get("model", {}).get("student") == arch:
            return path
    raise CheckpointError(
        f"none of the {len(checkpoints)} checkpoints under {root.absolute()} is a {arch}; train one, "
        f"name a file, or score it untrained with --random-init"
    )

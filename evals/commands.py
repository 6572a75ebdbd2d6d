"""The commands of `radio-eval` that score models: one task, all tasks, and the noise of the scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from radio.checkpoint import load as load_checkpoint
from radio.config import AttentionWindow
from radio.dist import Ranks, joined
from radio.errors import CheckpointError, ConfigError
from radio.hub import load_backbone
from radio.io import check_writable
from radio.progress import ProgressFactory, watch_on
from radio.resources import choose_device
from radio.students import students
from radio.types import Backbone

from .cli import Options
from .core.evaluator import Evaluator, RunSettings, run_evaluator, run_predictions
from .core.report import Kind, Report
from .core.suite import NOISE_FILE, Jobs, measure_noise, run_all, write_noise
from .core.task import windowed_name
from .tables import comparison, summary


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


def evaluate(
    evaluator: Evaluator[Any], options: Options, run: RunSettings, settings_of: Mapping[str, Any]
) -> int:
    """Score models on a task's data sets, with a table for each; return the exit code 0.

    Args:
        settings_of: the task's settings by the data set's name; see `settings_on`.
    """
    with _joined(run) as group:
        console, progress = _screen(options, group)
        _check_out(options)
        reports_of: dict[str, list[Report]] = {data_set: [] for data_set in settings_of}
        if not options.models and options.arch is None:
            for data_set, settings in settings_of.items():
                report = run_predictions(evaluator, settings, options.out or Path("reports"), run=run)
                reports_of[data_set] += [] if report is None else [report]
        for spec, model, name in () if any(reports_of.values()) else _models(options):
            for data_set, settings in settings_of.items():
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
                reports_of[data_set].append(report)
        for reports in reports_of.values():
            console.print(comparison(reports, plain=options.plain))
        for report in chain.from_iterable(reports_of.values()):
            skipped = [
                f"{len(used.skipped)} images of {used.name} could not be read and were left out; the first: "
                f"{used.skipped[0].key}: {used.skipped[0].reason}"
                for used in report.data
                if used.skipped
            ]
            for note in (*report.notes, *skipped):
                console.print(escape(f"{report.model}: {note}"))
    return 0


def evaluate_all(options: Options, run: RunSettings, jobs: Jobs) -> int:
    """Run all tasks; return the exit code: 1 when a task failed, else 0."""
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


def evaluate_noise(options: Options, run: RunSettings, jobs: Jobs, repeats: int) -> int:
    """Measure the noise of a model's scores; return the exit code 0."""
    console, progress = _screen(options, Ranks())
    _check_out(options)
    for spec, model, name in _models(options):
        log = _logger(console, name)
        noise = measure_noise(model, jobs, run=run, repeats=repeats, name=name, progress=progress, log=log)
        path = (options.out or _default_out(spec)) / NOISE_FILE
        write_noise(path, noise, fingerprint=model.fingerprint, repeats=repeats)
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


def _new_name(name: str, spec: str, options: Options, window: AttentionWindow | None, taken: set[str]) -> str:
    if _kind(options, spec) == "untrained" and not name.endswith("-untrained"):
        name = f"{name}-untrained"
    name = windowed_name(name, window)
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

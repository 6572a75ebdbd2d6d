"""Images per second of one or several models, measured alternately, with a report for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ConsoleTable
from torch import nn

from evals.core.blocks import Table
from evals.core.evaluator import EvalRun, Result, RunSettings, report_result
from evals.core.paper import TABLE_6_MODELS, table_6_row
from evals.core.report import Metric, Report
from evals.core.task import windowed_name
from radio.benchmark import (
    PRESETS,
    BenchmarkModel,
    Counts,
    Measurement,
    Protocol,
    count,
    measure,
    num_turns,
    prepare,
)
from radio.config import AttentionWindow, to_plain
from radio.errors import ConfigError, SizeError, did_you_mean
from radio.hub import choose_window, load_backbone
from radio.model import ModelConfig, RadioModel, build
from radio.progress import ProgressFactory, ProgressWithText, no_progress, watch_on
from radio.resources import check_memory, choose_device, describe_device
from radio.students import options_type, students
from radio.teachers.base import Frozen
from radio.types import Backbone

from . import ThroughputOptions, ThroughputSettings, make

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

COLUMNS = (
    *("variant", "batch", "images_per_second", "low", "high", "spread_percent", "calls_per_repeat"),
    *("ratio", "paper_ratio", "peak_memory_mib"),
)
"""Columns of the table in a report, which has a row per variant and batch."""

SPEED_TABLE = "speed"


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredModel:
    """A model to measure."""

    name: str
    model: Backbone
    paper_name: str = ""  # as in `evals.core.paper.TABLE_6_MODELS`
    untrained: bool = False
    resolution: int | None = None  # its own side in pixels; None = that of the settings


def make_protocol(settings: ThroughputSettings) -> Protocol:
    """Return batches, warm-up and repeats."""
    own = Protocol(
        repeats=settings.repeats,
        repeat_seconds=settings.repeat_seconds,
        warmup_seconds=settings.warmup_seconds,
    )
    protocol = own if settings.preset is None else PRESETS[settings.preset]
    return protocol if settings.batches is None else replace(protocol, batches=settings.batches)


def choose_dtype(settings: ThroughputSettings, device: torch.device) -> torch.dtype:
    """Return the precision of the models on a device."""
    automatic = "fp32" if device.type == "cpu" else "bf16"
    return DTYPES[automatic if settings.dtype == "auto" else settings.dtype]


def evaluate(model: Backbone, settings: ThroughputSettings, run: EvalRun) -> Result:
    """Measure one model alone.

    Raises:
        ConfigError: adaptors that the model does not have.
        SizeError: a resolution that the model does not accept.
    """
    entry = MeasuredModel(name=model.name, model=model, paper_name=paper_name(model))
    return measure_all([entry], settings, run.device, progress=run.progress)[0]


def paper_name(model: Backbone) -> str:
    """Return the name under which the paper's table 6 may list a model."""
    return model.config.student if isinstance(model, RadioModel) else model.name


def measure_all(
    entries: Sequence[MeasuredModel],
    settings: ThroughputSettings,
    device: torch.device,
    *,
    reference: str | None = None,
    progress: ProgressFactory = no_progress,
) -> list[Result]:
    """Measure all models in alternation in one run; return the result of each.

    Args:
        entries: models with unique names.
        reference: the model that ratios refer to (default: the first).

    Raises:
        ConfigError: no such reference, or adaptors that no model has.
        SizeError: a resolution that a model does not accept, or a batch larger than the memory.
    """
    reference = _check_names([entry.name for entry in entries], reference)
    sizes = {entry.name: _size(entry.model, entry.resolution or settings.resolution) for entry in entries}
    started = time.monotonic()
    dtype, protocol = choose_dtype(settings, device), make_protocol(settings)
    for entry in entries:
        check_memory(entry.model, max(protocol.batches), sizes[entry.name], device, dtype)
    counts = {entry.name: _count(entry.model, sizes[entry.name]) for entry in entries}
    if settings.with_adaptors and not any(_has_adaptors(entry.model) for entry in entries):
        raise ConfigError("none of the models has adaptors; leave --with-adaptors out")
    with _threads(settings.threads):
        models = [
            variant for entry in entries for variant in _variants(entry, settings, sizes[entry.name], device)
        ]
        with progress("throughput", num_turns(protocol, len(models))) as advance:

            def done(name: str) -> None:
                advance(1)
                if isinstance(advance, ProgressWithText):
                    advance.set_postfix(name)

            measurements = measure(models, protocol, device, done=done)
        description = describe_device(device)
    rates = {(one.name, one.variant, one.batch): one.images_per_second for one in measurements}
    rows_of_paper = {entry.name: table_6_row(entry.paper_name) for entry in entries}
    of_reference = rows_of_paper[reference]
    resolved = {
        "protocol": to_plain(protocol),
        "dtype": str(dtype).removeprefix("torch."),
        "measured_together": [entry.name for entry in entries],
        "reference": reference,
    }
    results = []
    for entry in entries:
        own = [one for one in measurements if one.name == entry.name]
        paper_ratio, of_paper = None, rows_of_paper[entry.name]
        if of_paper is not None and of_reference is not None:
            paper_ratio = of_paper.values["images_per_second"] / of_reference.values["images_per_second"]
        rows = [
            (
                *(one.variant, one.batch, one.images_per_second, one.low, one.high, one.spread, one.calls),
                one.images_per_second / rates[reference, "alone", one.batch],
                *(paper_ratio, one.peak_memory),
            )
            for one in own
        ]
        result = Result(
            metrics=_metrics(own, counts[entry.name]),
            blocks=[Table(title=SPEED_TABLE, columns=COLUMNS, rows=tuple(rows))],
            resolved={**resolved, "size": list(sizes[entry.name])},
            seconds={"total": time.monotonic() - started},
            device=description,
            notes=("untrained weights: the speed is the architecture's",) if entry.untrained else (),
        )
        results.append(result)
    return results


def report_all(
    entries: Sequence[MeasuredModel],
    settings: ThroughputSettings,
    out: Path,
    *,
    device: str = "auto",
    reference: str | None = None,
    progress: ProgressFactory = no_progress,
) -> list[Report]:
    """Measure all models as `measure_all` does, and write `throughput-NAME.json` of each into `out`."""
    run = RunSettings(device=device)
    results = measure_all(entries, settings, choose_device(device), reference=reference, progress=progress)
    return [
        report_result(
            make(),
            entry.model,
            settings,
            out,
            lambda _, result=result: result,  # type: ignore[misc]
            run=run,
            label=entry.name,
            kind="untrained" if entry.untrained else None,
        )
        for entry, result in zip(entries, results, strict=True)
    ]


def _check_names(names: Sequence[str], reference: str | None) -> str:
    """Check that names are unique and include the reference; return the reference (default: the first)."""
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise ConfigError(f"two models are called {twice}; name one of them once, or move one's folder")
    if reference is not None and reference not in names:
        hint = did_you_mean(reference, names) or f"; they are {', '.join(names)}"
        raise ConfigError(f"the reference {reference!r} is none of the models that are measured{hint}")
    return reference or names[0]


def _has_adaptors(model: Backbone) -> bool:
    return isinstance(model, RadioModel) and len(model.adaptors) > 0


def _variants(
    entry: MeasuredModel, settings: ThroughputSettings, size: tuple[int, int], device: torch.device
) -> Iterator[BenchmarkModel]:
    layouts = {"auto": None, "contiguous": False, "channels-last": True}
    for adaptors in (False, True) if settings.with_adaptors and _has_adaptors(entry.model) else (False,):
        for compiled in (False, True) if settings.compile else (False,):
            yield prepare(
                entry.name,
                entry.model,
                size,
                device,
                choose_dtype(settings, device),
                channels_last=layouts[settings.layout],
                compiled=compiled,
                adaptors=adaptors,
            )


def _size(model: Backbone, resolution: int | None) -> tuple[int, int]:
    if resolution is None:
        return model.native_size
    nearest = model.nearest_size(resolution, resolution)
    if nearest != (resolution, resolution):
        raise SizeError(
            f"{model.name} cannot take {resolution}x{resolution} px; the nearest size that it can is "
            f"{nearest[0]}x{nearest[1]}: give --resolution that, or leave it out"
        )
    return nearest


def _count(model: Backbone, size: tuple[int, int]) -> Counts | None:
    """Count parameters and multiply-adds of the backbone alone; None for a model that is no `nn.Module`."""
    alone: Any = model.student if isinstance(model, RadioModel) else model
    if not isinstance(alone, nn.Module):
        return None
    counts = count(alone, size)
    if isinstance(alone, Frozen):  # without its text tower
        trunk: Any = alone.trunk
        return counts._replace(parameters=sum(parameter.numel() for parameter in trunk.parameters()))
    return counts


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _metrics(measurements: Sequence[Measurement], counts: Counts | None) -> dict[str, Metric]:
    """Build the metrics of rates and counts; ratios are only in the table, as they depend on other models."""
    fastest = max(
        (one for one in measurements if one.variant == "alone"), key=lambda one: one.images_per_second
    )
    named = [("images_per_second", fastest)]
    for one in measurements:
        suffix = "" if one.variant == "alone" else "_" + one.variant.replace(", ", "_").replace(" ", "_")
        named.append((f"images_per_second_batch_{one.batch}{suffix}", one))
    metrics = {
        name: Metric(value=one.images_per_second, low=one.low, high=one.high, unit="images/s")
        for name, one in named
    }
    if counts is not None:
        millions = counts.parameters / 1e6
        metrics["parameters"] = Metric(value=millions, higher_is_better=False, unit="M")
        metrics["gmacs"] = Metric(value=counts.gmacs, higher_is_better=False, unit="G")
    return metrics


def run_throughput(options: ThroughputOptions, plot: Callable[[Path], Path | None]) -> int:
    """Run the command and return its exit code: 0 when every report was written.

    Args:
        options: the models, and how to measure them.
        plot: plots quality against speed from a folder of reports; returns the file, or None without data.

    Raises:
        RadioError: an unknown or repeated model.
    """
    of_paper = [name for name in TABLE_6_MODELS if name in students] if options.table6 else []
    specs = [*options.models, *(name for name in of_paper if name not in options.models)]
    if not specs:
        raise ConfigError("no model was named; give an architecture, a checkpoint, a spec, or --table6")
    twice = next((spec for index, spec in enumerate(specs) if spec in specs[:index]), None)
    if twice is not None:
        raise ConfigError(f"{twice} was named twice; once is enough")
    console, progress = Console(no_color=options.plain, highlight=False), Console(stderr=True)
    reports = report_all(
        [
            load_entry(spec, options.settings.resolution, window)
            for spec in specs
            for window in dict.fromkeys(options.window or (None,))
        ],
        options.settings,
        options.out,
        device=options.device,
        reference=options.reference,
        progress=watch_on(progress, shown=progress.is_terminal and not options.plain),
    )
    console.print(speed_table(reports, plain=options.plain))
    if (image := plot(options.out)) is not None:
        console.print(escape(str(image)), soft_wrap=True)
    return 0


def load_entry(
    spec: str, resolution: int | None = None, window: AttentionWindow | None = None
) -> MeasuredModel:
    """Load the model that a spec names; an architecture is built with random weights.

    Raises:
        RadioError: an unknown name, a file that does not exist, or a window that the model does not have.
    """
    arch = spec.removeprefix("arch:")
    if arch not in students:
        model = load_backbone(spec, window=window)
        name = windowed_name(model.name, window)
        return MeasuredModel(name=name, model=model, paper_name=paper_name(model) if window is None else "")
    options = options_type(arch)()
    if options.has("image_size"):
        options = options.change(image_size=resolution)
    untrained = choose_window(build(ModelConfig(student=arch, options=options), 0).eval(), window, spec)
    name = windowed_name(arch, window)
    return MeasuredModel(
        name=name, model=untrained, paper_name=arch if window is None else "", untrained=True
    )


def speed_table(reports: Sequence[Report], *, plain: bool = False) -> ConsoleTable:
    """Build a table with a row per model, batch and variant, with our and the paper's ratio."""
    resolved = reports[0].settings["resolved"]
    sizes = ["x".join(map(str, report.settings["resolved"]["size"])) for report in reports]
    same = len(set(sizes)) == 1
    table = ConsoleTable(
        box=box.ASCII if plain else box.ROUNDED,
        title=f"{resolved['dtype']} on {reports[0].device}{f', {sizes[0]} px' if same else ''}",
        caption=f"ratio: to {resolved['reference']}; paper: the same ratio in its table 6",
    )
    table.add_column("model", overflow="fold")
    for title in ("M", "GMACs", "batch", "images/s", "±", "ratio", "paper", "MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for report, size in zip(reports, sizes, strict=True):
        figures = {name: metric.value for name, metric in report.metrics.items()}
        for values in speed_rows(report):
            row: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
            remarks = [] if row["variant"] == "alone" else [row["variant"]]
            remarks += [] if same else [f"{size} px"]
            table.add_row(
                escape(" ".join([report.model, *remarks])),
                _number(figures.get("parameters"), ".1f"),
                _number(figures.get("gmacs"), ".2f"),
                str(row["batch"]),
                f"{row['images_per_second']:.4g}",
                f"{row['spread_percent']:.0f} %",
                f"{row['ratio']:.2f}",
                _number(row["paper_ratio"], ".2f"),
                _number(row["peak_memory_mib"], ".0f"),
            )
    return table


def speed_rows(report: Report) -> Sequence[Sequence[str | int | float | None]]:
    """Return the rows of a report's table of rates, under `COLUMNS`."""
    return next(
        block.rows for block in report.blocks if isinstance(block, Table) and block.title == SPEED_TABLE
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

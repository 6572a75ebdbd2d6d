"""Images per second of one or several models, measured in alternation, with a report for each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from evals.core.blocks import Table
from evals.core.paper import table_6_row
from evals.core.report import Metric, Report, file_name, write
from radio.benchmark import Adapted, BenchmarkModel, Counts, Measurement, count, measure, num_turns, prepare
from radio.config import to_plain
from radio.errors import ConfigError, SizeError, did_you_mean
from radio.memory import check_memory
from radio.model import RadioModel
from radio.progress import ProgressFactory, ProgressWithText, no_progress
from radio.provenance import choose_device, commit, describe_device, versions
from radio.teachers.frozen import Frozen
from radio.types import Backbone

from .settings import ThroughputSettings

COLUMNS = (
    *("variant", "batch", "images_per_second", "low", "high", "spread_percent", "calls_per_window"),
    *("ratio", "paper_ratio", "peak_memory_mib"),
)
"""Columns of the table in a report, which has a row per variant and batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A model to measure."""

    name: str
    model: Backbone
    paper_name: str = ""  # as in `evals.core.paper.TABLE_6_MODELS`
    untrained: bool = False


@final
class ThroughputEvaluator:
    """Measures images per second of a backbone alone, and with its adaptors."""

    name = "throughput"
    on_request = True  # no score: it wants an otherwise idle machine
    settings = ThroughputSettings

    def run(
        self,
        model: Backbone,
        settings: ThroughputSettings,
        out: Path,
        *,
        name: str | None = None,
        watch: ProgressFactory = no_progress,
    ) -> Report:
        """Measure `model` and write `throughput-NAME.json` into `out`.

        Raises:
            ConfigError: an unknown device, or adaptors that the model does not have.
            SizeError: a resolution that the model does not accept.
        """
        entry = Entry(name=name or model.name, model=model, paper_name=paper_name(model))
        return measure_all([entry], settings, out, watch=watch)[0]


def measure_all(
    entries: Sequence[Entry],
    settings: ThroughputSettings,
    out: Path,
    *,
    reference: str | None = None,
    watch: ProgressFactory = no_progress,
) -> list[Report]:
    """Measure all models in alternation in one run and write `throughput-NAME.json` of each into `out`.

    Args:
        entries: models with unique names.
        settings: the protocol.
        out: the folder of the reports.
        reference: the model that ratios refer to (default: the first).
        watch: shows the progress.

    Raises:
        ConfigError: no such reference, an unknown device, or adaptors that no model has.
        SizeError: a resolution that a model does not accept, or a batch larger than the memory.
    """
    reference = _check_names([entry.name for entry in entries], reference)
    sizes = {entry.name: _size(entry.model, settings.resolution) for entry in entries}
    device, started = choose_device(settings.device), time.monotonic()
    most = max(settings.protocol.batches)
    for entry in entries:
        check_memory(entry.model, most, sizes[entry.name], device, settings.dtype_on(device))
    counts = {entry.name: _count(entry.model, sizes[entry.name]) for entry in entries}
    with _threads(settings.threads):
        contenders = [
            contender
            for entry in entries
            for contender in _variants(entry, entries, settings, sizes[entry.name], device)
        ]
        found = _measured(contenders, settings, device, watch)
        described = describe_device(device)
    papers = {entry.name: _paper_rate(entry.paper_name) for entry in entries}
    resolved = {
        "protocol": to_plain(settings.protocol),
        "dtype": str(settings.dtype_on(device)).removeprefix("torch."),
        "measured_together": [entry.name for entry in entries],
        "reference": reference,
    }
    reports = []
    for entry in entries:
        mine = [one for one in found if one.name.split(_VARIANT)[0] == entry.name]
        rows = _rows(mine, found, reference, _ratio(papers[entry.name], papers[reference]))
        report = Report(
            task="throughput",
            model=entry.name,
            fingerprint=entry.model.fingerprint,
            primary_metric="images_per_second",
            metrics=_metrics(mine, counts[entry.name]),
            settings={**to_plain(settings), "resolved": {**resolved, "size": list(sizes[entry.name])}},
            data=(),
            device=described,
            seconds={"total": time.monotonic() - started},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            git=commit(),
            metadata=dict(entry.model.metadata),
            peak_memory=max((one.peak_memory for one in mine if one.peak_memory is not None), default=None),
            notes=("untrained weights: the speed is the architecture's",) if entry.untrained else (),
            tables={"speed": Table(columns=COLUMNS, rows=rows)},
        )
        write(report, out / f"{file_name('throughput', entry.name)}.json")
        reports.append(report)
    return reports


def paper_name(model: Backbone) -> str:
    """Return the name under which the paper's table 6 may list a model."""
    return model.config.student if isinstance(model, RadioModel) else model.name


_VARIANT = " / "  # between a model's name and the measured variant
_PLAIN = "alone"


def _variants(
    entry: Entry,
    entries: Sequence[Entry],
    settings: ThroughputSettings,
    size: tuple[int, int],
    device: torch.device,
) -> Iterator[BenchmarkModel]:
    forms: list[tuple[str, str, Any]] = [(_PLAIN, "compiled", entry.model)]
    if settings.with_adaptors:
        if not any(isinstance(each.model, RadioModel) and each.model.adaptors for each in entries):
            raise ConfigError("none of the models has adaptors; leave --with-adaptors out")
        if isinstance(entry.model, RadioModel) and entry.model.adaptors:
            forms.append(("with adaptors", "with adaptors, compiled", Adapted(entry.model)))
    for eager, compiled_form, module in forms:
        for compiled in (False, True) if settings.compile else (False,):
            yield prepare(
                f"{entry.name}{_VARIANT}{compiled_form if compiled else eager}",
                module,
                size,
                device,
                settings.dtype_on(device),
                channels_last=settings.channels_last,
                compiled=compiled,
            )


def _check_names(names: Sequence[str], reference: str | None) -> str:
    """Check that names are unique and include the reference; return the reference (default: the first)."""
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ConfigError(f"two models are called {twice}; name one of them once, or move one's folder")
    if reference is not None and reference not in names:
        hint = did_you_mean(reference, names) or f"; they are {', '.join(names)}"
        raise ConfigError(f"the reference {reference!r} is none of the models that are measured{hint}")
    return reference or names[0]


def _measured(
    contenders: Sequence[BenchmarkModel],
    settings: ThroughputSettings,
    device: torch.device,
    watch: ProgressFactory,
) -> list[Measurement]:
    with watch("throughput", num_turns(settings.protocol, len(contenders))) as advance:

        def done(name: str) -> None:
            advance(1)
            if isinstance(advance, ProgressWithText):
                advance.set_postfix(name)

        return measure(contenders, settings.protocol, device, done=done)


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
    whole = count(alone, size)
    if isinstance(alone, Frozen):  # without its text tower
        trunk: Any = alone.trunk
        return whole._replace(parameters=sum(parameter.numel() for parameter in trunk.parameters()))
    return whole


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _paper_rate(name: str) -> float | None:
    row = table_6_row(name)
    return None if row is None else row.values["images_per_second"]


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _rows(
    mine: Sequence[Measurement], found: Sequence[Measurement], reference: str, paper_ratio: float | None
) -> tuple[tuple[str | int | float | None, ...], ...]:
    rates = {(one.name, one.batch): one.images_per_second for one in found}
    return tuple(
        (
            *(one.name.split(_VARIANT)[1], one.batch, one.images_per_second, one.low, one.high, one.spread),
            one.calls,
            one.images_per_second / rates[f"{reference}{_VARIANT}{_PLAIN}", one.batch],
            *(paper_ratio, one.peak_memory),
        )
        for one in mine
    )


def _metrics(mine: Sequence[Measurement], counts: Counts | None) -> dict[str, Metric]:
    """Build the metrics of rates and counts; ratios are only in the table, as they depend on other models."""
    variants = {one: one.name.split(_VARIANT)[1] for one in mine}
    plain = [one for one in mine if variants[one] == _PLAIN]
    metrics = {"images_per_second": _rate(max(plain, key=lambda one: one.images_per_second))}
    for one, variant in variants.items():
        suffix = "" if variant == _PLAIN else "_" + variant.replace(", ", "_").replace(" ", "_")
        metrics[f"images_per_second_batch_{one.batch}{suffix}"] = _rate(one)
    if counts is not None:
        millions = counts.parameters / 1e6
        metrics["parameters"] = Metric(value=millions, higher_is_better=False, unit="M")
        metrics["gmacs"] = Metric(value=counts.gmacs, higher_is_better=False, unit="G")
    return metrics


def _rate(one: Measurement) -> Metric:
    return Metric(value=one.images_per_second, low=one.low, high=one.high, unit="images/s")

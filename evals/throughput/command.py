"""`radio-eval throughput`: compare several models with each other and with the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.core.blocks import Table as SpeedTable
from evals.core.paper import TABLE_6_MODELS
from evals.core.report import Report
from radio.config import check, parse_options
from radio.errors import ConfigError
from radio.hub import load_backbone
from radio.model import ModelConfig, build
from radio.progress import watch_on
from radio.students import options_type, students

from .evaluator import COLUMNS, SPEED_TABLE, MeasuredModel, ThroughputSettings, paper_name, report_all


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputOptions:
    """Models, reference and output of the measurement."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Architectures (untrained, which does not affect speed), checkpoint files, or teachers' specs."""
    table6: bool = False
    """Also measure every architecture of the paper's table 6."""
    reference: str | None = None
    """The model that ratios refer to. Default: the first."""
    out: Path = Path("reports")
    """Folder of the reports. If it has k-NN reports of the same models, quality is plotted against speed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    plain: bool = False
    """Print without progress bars, colours and box lines."""
    settings: Annotated[ThroughputSettings, tyro.conf.arg(name="")] = field(
        default_factory=ThroughputSettings
    )


def run_throughput(arguments: Sequence[str], plot: Callable[[Path], Path | None]) -> int:
    """Run the command and return its exit code: 0 when every report was written.

    Args:
        arguments: the command line.
        plot: plots quality against speed from a folder of reports; returns the file, or None without data.

    Raises:
        RadioError: an unknown or repeated model, or settings that cannot be measured.
    """
    options = check(
        parse_options(
            ThroughputOptions,
            arguments,
            prog="radio-eval throughput",
            description="Images a second, multiply-adds and memory of several models, measured in turns.",
        )
    )
    console, progress = Console(no_color=options.plain, highlight=False), Console(stderr=True)
    reports = report_all(
        [load_entry(spec, options.settings.resolution) for spec in _specs(options)],
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


def load_entry(spec: str, resolution: int | None = None) -> MeasuredModel:
    """Load the model that a spec names; an architecture is built with random weights.

    Raises:
        RadioError: an unknown name, or a file that does not exist.
    """
    arch = spec.removeprefix("arch:")
    if arch not in students:
        model = load_backbone(spec)
        return MeasuredModel(name=model.name, model=model, paper_name=paper_name(model))
    options = options_type(arch)()
    if options.has("image_size"):
        options = options.change(image_size=resolution)
    untrained = build(ModelConfig(student=arch, options=options), 0).eval()
    return MeasuredModel(name=arch, model=untrained, paper_name=arch, untrained=True)


def speed_table(reports: Sequence[Report], *, plain: bool = False) -> Table:
    """Build a table with a row per model, batch and variant, with our and the paper's ratio."""
    resolved = reports[0].settings["resolved"]
    sizes = ["x".join(map(str, report.settings["resolved"]["size"])) for report in reports]
    same = len(set(sizes)) == 1
    table = Table(
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
        block.rows for block in report.blocks if isinstance(block, SpeedTable) and block.title == SPEED_TABLE
    )


def _specs(options: ThroughputOptions) -> list[str]:
    of_paper = [name for name in TABLE_6_MODELS if name in students] if options.table6 else []
    specs = [*options.models, *(name for name in of_paper if name not in options.models)]
    if not specs:
        raise ConfigError("no model was named; give an architecture, a checkpoint, a spec, or --table6")
    twice = next((spec for index, spec in enumerate(specs) if spec in specs[:index]), None)
    if twice is not None:
        raise ConfigError(f"{twice} was named twice; once is enough")
    return specs


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

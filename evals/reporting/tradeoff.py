"""Quality against speed: one point for each model that has a report of both in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evals.core.report import Report
from radio.io import write_text

from .compare import read_reports
from .figures import NUM_SLOTS, Series, scatter, standing_alone

FILE = "quality-against-speed.svg"


def draw_tradeoff(folder: Path) -> Path | None:
    """Plot k-NN's primary metric over images a second as an SVG in `folder`; None where no reports match.

    A k-NN report matches a report of speed with the same weights, or of the same architecture untrained.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    reports = [entry.report for entry in read_reports(folder).values()]
    speeds = [report for report in reports if report.task == "throughput"]
    pairs = [
        (quality, speed)
        for quality in reports
        if quality.task == "knn" and (speed := _speed_of(quality, speeds)) is not None
    ]
    if not pairs:
        return None
    points = [_point(quality, speed, place) for place, (quality, speed) in enumerate(pairs)]
    primary_metric = pairs[0][0].primary_metric
    svg = scatter(points, name="tradeoff", x_label="images a second", y_label=f"k-NN {primary_metric} (%)")
    write_text(folder / FILE, standing_alone(svg))
    return folder / FILE


def _speed_of(quality: Report, speeds: list[Report]) -> Report | None:
    described = quality.metadata.get("model")
    student = described.get("student") if isinstance(described, Mapping) else None
    same = [report for report in speeds if report.fingerprint == quality.fingerprint]
    alike = [report for report in speeds if student is not None and report.model == student]
    return next(iter([*same, *alike]), None)


def _point(quality: Report, speed: Report, place: int) -> Series:
    found = quality.metrics[quality.primary_metric]
    return Series(
        name=quality.model,
        color=place % NUM_SLOTS,
        x=(speed.metrics[speed.primary_metric].value,),
        y=(found.value,),
        low=(found.low,),
        high=(found.high,),
    )

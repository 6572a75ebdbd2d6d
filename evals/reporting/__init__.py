"""Pages and comparisons of reports: the commands' options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from radio.config import NotNegative


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """Write a folder of reports as one HTML page: tables, plots and images in one file."""

    reports: tyro.conf.Positional[Path]
    """The folder of the reports."""
    html: Path = Path("report.html")
    """The page to write."""
    run: Path | None = None
    """A folder that radio-train wrote: adds its training curves."""
    tables: Path | None = None
    """The tables.json that `radio-train tables` wrote: adds the paper's tables made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """Compare two folders of reports, metric by metric."""

    reports: tyro.conf.Positional[Path]
    """The folder of the new reports."""
    baseline: Path
    """The folder that they are compared with."""
    tolerance: NotNegative = 0.5
    """A drop of up to so many points is no regression."""
    noise: Path | None = None
    """What radio-eval noise measured: a drop within it is no regression. Default: `noise.json` beside the
    baseline's reports, if it exists."""
    fail_on_regression: bool = False
    """Exit with code 1 when a metric dropped by more, or a task or metric of the baseline is missing."""
    markdown: Path | None = None
    """Also write the table as markdown, for a step summary."""
    junit: Path | None = None
    """Also write JUnit XML."""
    plain: bool = False
    """No colours and no box-drawing characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrendOptions:
    """Write many nights' reports as one HTML page: metrics over time, and the commits where they jumped."""

    nights: tyro.conf.Positional[Path]
    """A folder with one folder of reports a night."""
    html: Path = Path("trend.html")
    """The page to write."""
    tolerance: NotNegative = 1.0
    """A primary metric that moves by more points from one night to the next has jumped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaderboardOptions:
    """Rank many models over all their tasks, with groups that the scores cannot resolve."""

    reports: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of reports."""
    tasks: tuple[str, ...] = ()
    """Only these tasks. Default: all that two models or more have."""
    html: Path | None = None
    """Also write it as a page."""
    markdown: Path | None = None
    """Also write the table as markdown."""
    plain: bool = False
    """No box-drawing characters."""

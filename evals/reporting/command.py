"""`radio-eval compare` and `radio-eval trend`: a gate for one night, and a page of many nights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from evals.core.noise import NOISE_FILE, read_noise
from radio.config import NotNegative, check
from radio.errors import shown
from radio.io import check_file, write_text
from radio.options import parse_options

from .compare import compare, read_reports, regressions
from .rendering import junit, markdown, terminal_table
from .trend import write_trend


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
    """Exit with code 1 when a metric dropped by more, or a task of the baseline is missing."""
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


def run_trend(arguments: Sequence[str]) -> int:
    """Run `radio-eval trend`; return the exit code 0 when the page was written.

    Raises:
        DataError: no such folder, fewer than two nights, or a damaged report.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    options = check(parse_options(TrendOptions, arguments, prog="radio-eval trend"))
    check_file(options.html, "--html")
    size, jumps = write_trend(options.nights, options.html, options.tolerance)
    console = Console(highlight=False)
    for jump in jumps:
        line = f"{jump.nights[1]}: {jump.task} {jump.model} {jump.metric} {jump.before.value:.1f} to "
        console.print(f"{shown(line)}{jump.after.value:.1f}", markup=False, soft_wrap=True)
    console.print(f"{options.html}: {len(jumps)} jumps, {size / 1e6:.2f} MB", markup=False, soft_wrap=True)
    return 0


def run_compare(arguments: Sequence[str]) -> int:
    """Run `radio-eval compare`; return the exit code: 1 for a regression with --fail-on-regression, else 0.

    Raises:
        DataError: a folder without reports, or reports that differ in settings or data.
        ConfigError: a tolerance below 0.
    """
    options = check(parse_options(CompareOptions, arguments, prog="radio-eval compare"))
    for option, path in (("--markdown", options.markdown), ("--junit", options.junit)):
        if path is not None:
            check_file(path, option)
    noise = options.noise or options.baseline / NOISE_FILE
    changes = compare(
        read_reports(options.reports),
        read_reports(options.baseline),
        tolerance=options.tolerance,
        noise=read_noise(noise) if options.noise is not None or noise.is_file() else {},
    )
    console = Console(no_color=options.plain, highlight=False)
    console.print(terminal_table(changes, plain=options.plain or not console.is_terminal))
    if options.markdown is not None:
        write_text(options.markdown, markdown(changes))
    if options.junit is not None:
        write_text(options.junit, junit(changes))
    bad = regressions(changes)
    said = shown(", ".join(f"{change.task} {change.metric}" for change in bad)) or "none"
    console.print(f"regressions beyond {options.tolerance:g} points and the noise: {said}", markup=False)
    return int(bool(bad) and options.fail_on_regression)

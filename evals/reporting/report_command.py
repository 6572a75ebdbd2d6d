"""`radio-eval report`: a folder of reports as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from radio.config import check
from radio.errors import shown
from radio.io import check_file
from radio.options import parse_options

from .html import write_page


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """Write a folder of reports as one HTML page: tables, plots and images in one file."""

    reports: tyro.conf.Positional[Path]
    """The folder of the reports."""
    html: Path = Path("report.html")
    """The page to write."""
    run: Path | None = None
    """A folder that radio-train wrote: adds its curves, and the feature maps of its student and teachers."""
    models: tuple[str, ...] = ()
    """Also show the feature maps of these models: checkpoint files, or specs such as scenes:clip."""
    maps: bool = True
    """Draw feature maps, which needs the models."""


def run_report(arguments: Sequence[str]) -> int:
    """Run `radio-eval report`; return the exit code 0 when the page was written.

    Raises:
        DataError: a folder without reports, a damaged report, or a run folder without metrics.
        ConfigError: a page that is a folder, or an unknown model.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    options = check(parse_options(ReportOptions, arguments, prog="radio-eval report"))
    check_file(options.html, "--html")
    size = write_page(
        options.reports, options.html, run=options.run, models=options.models, images=options.maps
    )
    Console(highlight=False).print(
        f"{shown(options.html)}: {size / 1e6:.2f} MB", markup=False, soft_wrap=True
    )
    return 0

"""`radio-eval compare`: a gate for continuous integration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from radio.config import write_text
from radio.errors import ConfigError

from .compare import compare, read_reports, regressions
from .rendering import junit, markdown, terminal_table


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """Compares two folders of reports, metric by metric."""

    reports: tyro.conf.Positional[Path]
    """The folder of the new reports."""
    baseline: Path
    """The folder that they are compared with."""
    tolerance: float = 0.5
    """A drop of so many points is no regression."""
    fail_on_regression: bool = False
    """Exit with 1 when a metric dropped by more, or a task of the baseline is missing."""
    markdown: Path | None = None
    """Also write the table as markdown, for a step summary."""
    junit: Path | None = None
    """Also write JUnit XML."""
    plain: bool = False
    """No colours, no drawn lines."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.tolerance < 0:
            raise ConfigError(f"tolerance = {self.tolerance}: give 0 or more")


def run_compare(arguments: Sequence[str]) -> int:
    """The exit code: 1 for a regression where one is asked to fail, else 0.

    Raises:
        DataError: a folder without reports, or reports that were not made alike.
        ConfigError: a tolerance below 0.
    """
    options = tyro.cli(CompareOptions, prog="radio-eval compare", args=list(arguments))
    changes = compare(
        read_reports(options.reports), read_reports(options.baseline), tolerance=options.tolerance
    )
    console = Console(no_color=options.plain, highlight=False)
    console.print(terminal_table(changes, plain=options.plain or not console.is_terminal))
    if options.markdown is not None:
        write_text(options.markdown, markdown(changes))
    if options.junit is not None:
        write_text(options.junit, junit(changes))
    bad = regressions(changes)
    said = ", ".join(f"{change.task} {change.metric}" for change in bad) or "none"
    console.print(f"regressions beyond {options.tolerance:g} points: {said}", markup=False)
    return int(bool(bad) and options.fail_on_regression)

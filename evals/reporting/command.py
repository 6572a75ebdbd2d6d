"""`radio-eval report`, `compare`, `trend` and `leaderboard`: pages, a gate for one night, and a ranking."""

from __future__ import annotations

import re
import xml.etree.ElementTree as Xml
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.core.suite import NOISE_FILE, read_noise
from radio.errors import shown
from radio.io import check_file, write_text

from . import CompareOptions, LeaderboardOptions, ReportOptions, TrendOptions
from .compare import Change, compare, read_reports, regressions
from .leaderboard import leaderboard_table, make_leaderboard, read_all, write_leaderboard
from .page import write_page
from .trend import write_trend

_MARKS = {"better": "▲", "worse": "▼", "missing": "✗", "new": "+"}
_STYLES = {"better": "green", "worse": "bold red", "missing": "bold red"}
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COLUMNS = ("task", "model", "metric", "new", "baseline", "difference", "95 %", "verdict")


def run_report(options: ReportOptions) -> int:
    """Run `radio-eval report`; return the exit code 0 when the page was written.

    Raises:
        DataError: a folder without reports, a damaged report or file of tables, or a run folder without
            metrics.
        ConfigError: a page that is a folder.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    check_file(options.html, "--html")
    size = write_page(options.reports, options.html, run=options.run, tables=options.tables)
    Console(highlight=False).print(
        f"{shown(options.html)}: {size / 1e6:.2f} MB", markup=False, soft_wrap=True
    )
    return 0


def run_compare(options: CompareOptions) -> int:
    """Run `radio-eval compare`; return the exit code: 1 for a regression with --fail-on-regression, else 0.

    Raises:
        DataError: a folder without reports, or reports that differ in settings or data.
    """
    for option, path in (("--markdown", options.markdown), ("--junit", options.junit)):
        if path is not None:
            check_file(path, option)
    noise = options.noise or options.baseline / NOISE_FILE
    has_noise = options.noise is not None or noise.is_file()
    changes = compare(
        read_reports(options.reports),
        read_reports(options.baseline),
        tolerance=options.tolerance,
        noise=read_noise(noise) if has_noise else {},
    )
    console = Console(no_color=options.plain, highlight=False)
    console.print(terminal_table(changes, plain=options.plain or not console.is_terminal))
    if options.markdown is not None:
        write_text(options.markdown, markdown(changes))
    if options.junit is not None:
        write_text(options.junit, junit(changes))
    bad = regressions(changes)
    names = shown(", ".join(f"{change.task} {change.metric}" for change in bad)) or "none"
    beyond = " and the noise" if has_noise else ""
    console.print(f"regressions beyond {options.tolerance:g} points{beyond}: {names}", markup=False)
    return int(bool(bad) and options.fail_on_regression)


def run_trend(options: TrendOptions) -> int:
    """Run `radio-eval trend`; return the exit code 0 when the page was written.

    Raises:
        DataError: no such folder, fewer than two nights, or a damaged report.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    check_file(options.html, "--html")
    size, jumps = write_trend(options.nights, options.html, options.tolerance)
    console = Console(highlight=False)
    for jump in jumps:
        line = f"{jump.nights[1]}: {jump.task} {jump.model} {jump.metric} {jump.before.value:.1f} to "
        console.print(f"{shown(line)}{jump.after.value:.1f}", markup=False, soft_wrap=True)
    console.print(f"{options.html}: {len(jumps)} jumps, {size / 1e6:.2f} MB", markup=False, soft_wrap=True)
    return 0


def run_leaderboard(options: LeaderboardOptions) -> int:
    """Run `radio-eval leaderboard`; return the exit code 0 when the ranking was printed.

    Raises:
        DataError: a folder without reports, a damaged one, nothing that two models have, or reports that
            do not say of which weights they are and differ.
        ConfigError: a task that no report is of.
        MissingExtraError: a page is asked for, and jinja2 or matplotlib is not installed.
    """
    for option, path in (("--html", options.html), ("--markdown", options.markdown)):
        if path is not None:
            check_file(path, option)
    board = make_leaderboard(read_all(options.reports), options.tasks)
    head, *rows = leaderboard_table(board)
    console = Console(highlight=False)
    table = Table(box=box.ASCII if options.plain or not console.is_terminal else box.ROUNDED)
    for place, name in enumerate(head):
        table.add_column(escape(shown(name)), justify="right" if place > 1 else "left")
    for row in rows:
        table.add_row(*(escape(shown(cell)) for cell in row))
    console.print(table)
    for note in board.notes:
        console.print(shown(note), markup=False, soft_wrap=True)
    if options.markdown is not None:
        lines = [f"| {' | '.join(map(_escaped, row))} |" for row in (head, *rows)]
        write_text(options.markdown, "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]]) + "\n")
    if options.html is not None:
        size = write_leaderboard(board, options.html)
        console.print(f"{shown(options.html)}: {size / 1e6:.2f} MB", markup=False, soft_wrap=True)
    return 0


def terminal_table(changes: Sequence[Change], *, plain: bool) -> Table:
    """Render the changes as a terminal table, one row for each metric."""
    table = Table(box=box.ASCII if plain else box.ROUNDED)
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _COLUMNS[3:7] else "left")
    for change in changes:
        style = None if plain else _STYLES.get(change.verdict)
        table.add_row(*(escape(shown(cell)) for cell in _cells(change)), style=style)
    return table


def markdown(changes: Sequence[Change]) -> str:
    """Render the changes as a markdown table, for a step summary."""
    bad = len(regressions(changes))
    lines = [
        f"**{bad} regression{'s' if bad != 1 else ''}** in {len(changes)} metrics",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    lines += [f"| {' | '.join(_escaped(cell) for cell in _cells(change))} |" for change in changes]
    return "\n".join(lines) + "\n"


def junit(changes: Sequence[Change]) -> str:
    """Render the changes as JUnit XML: a suite a task, a case a metric; a regression is a failure."""
    root = Xml.Element("testsuites", name="radio-eval compare")
    for task in dict.fromkeys(change.task for change in changes):
        of_task = [change for change in changes if change.task == task]
        failed = len(regressions(of_task))
        suite = Xml.SubElement(
            root, "testsuite", name=_for_xml(task), tests=str(len(of_task)), failures=str(failed), errors="0"
        )
        for change in of_task:
            where = _for_xml(f"{task}.{change.model}")
            case = Xml.SubElement(suite, "testcase", classname=where, name=_for_xml(change.metric))
            if change.verdict in ("worse", "missing"):
                message = ", ".join(
                    f"{name} {cell}"
                    for name, cell in zip(_COLUMNS[3:], _cells(change)[3:], strict=True)
                    if cell
                )
                Xml.SubElement(case, "failure", message=_for_xml(message))
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _for_xml(text: str) -> str:
    """Replace characters that XML 1.0 cannot hold, escaped or not, by U+FFFD."""
    return _NOT_IN_XML.sub("\ufffd", text)


def _cells(change: Change) -> list[str]:
    between = ""
    if change.low is not None and change.high is not None:
        between = f"{change.low:+.2f} to {change.high:+.2f}{' paired' if change.paired else ''}"
    metric = f"{change.metric} ({change.unit})" if change.unit else change.metric
    verdict = f"{_MARKS.get(change.verdict, '')} {change.verdict}".strip()
    return [
        change.task,
        change.model,
        metric,
        *("" if value is None else f"{value:.2f}" for value in (change.value, change.baseline)),
        "" if change.difference is None else f"{change.difference:+.2f}",
        between,
        verdict,
    ]


def _escaped(cell: str) -> str:
    return shown(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

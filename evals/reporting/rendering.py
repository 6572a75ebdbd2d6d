"""Renders a comparison as a terminal table, as markdown and as JUnit XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as Xml
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from radio.errors import shown

from .compare import Change, regressions

_MARKS = {"better": "▲", "worse": "▼", "same": "", "missing": "✗", "new": "+", "timing": ""}
_STYLES = {"better": "green", "worse": "bold red", "missing": "bold red"}
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_COLUMNS = ("task", "model", "metric", "new", "baseline", "difference", "95 %", "verdict")


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
        mine = [change for change in changes if change.task == task]
        failed = len(regressions(mine))
        suite = Xml.SubElement(
            root, "testsuite", name=_for_xml(task), tests=str(len(mine)), failures=str(failed), errors="0"
        )
        for change in mine:
            where = _for_xml(f"{task}.{change.model}")
            case = Xml.SubElement(suite, "testcase", classname=where, name=_for_xml(change.metric))
            if change.verdict in ("worse", "missing"):
                said = ", ".join(
                    f"{name} {cell}"
                    for name, cell in zip(_COLUMNS[3:], _cells(change)[3:], strict=True)
                    if cell
                )
                Xml.SubElement(case, "failure", message=_for_xml(said))
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _for_xml(text: str) -> str:
    """Replace characters that XML 1.0 cannot hold, escaped or not, by U+FFFD."""
    return _NOT_IN_XML.sub("\ufffd", text)


def _cells(change: Change) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    between = ""
    if change.low is not None and change.high is not None:
        between = f"{change.low:+.2f} to {change.high:+.2f}{' paired' if change.paired else ''}"
    difference = "" if change.difference is None else f"{change.difference:+.2f}"
    metric = f"{change.metric} ({change.unit})" if change.unit else change.metric
    verdict = f"{_MARKS[change.verdict]} {change.verdict}".strip()
    return [
        change.task,
        change.model,
        metric,
        number(change.value),
        number(change.baseline),
        difference,
        between,
        verdict,
    ]


def _escaped(cell: str) -> str:
    return shown(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

"""Plots as SVG inside the page: one size, the page's colours in light and dark mode, no scripts.

The same input gives the same text. Colours are the page's CSS variables, so that a plot follows the reader's
colour scheme; text stays text, escaped by the XML writer.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
import xml.etree.ElementTree as Xml
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Self

from evals.core.report import Metric, Report
from radio.errors import require
from radio.io import write_text

from .compare import read_reports

TRADEOFF_FILE = "quality-against-speed.svg"

NUM_SLOTS = 8
"""Number of colours; further series use them again, with another marker and line style."""

_INK, _FAINT = "#010203", "#010204"  # placeholders, replaced by the page's variables
_SLOTS = tuple(f"#0103{place:02x}" for place in range(NUM_SLOTS))
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--rule)",
    **{colour: f"var(--s{place})" for place, colour in enumerate(_SLOTS)},
}
_LIGHT = ("#1668b0", "#d1690e", "#2b8a4b", "#b5338a", "#7a58c1", "#8a6d1c", "#188a94", "#666d73")
_DARK = ("#5aa9ee", "#f49a4a", "#5fc583", "#ec7cc6", "#ae95ef", "#d4b65a", "#4fc4ce", "#a9b1b7")
_MARKS = "osD^vPX*"
_STYLES = ("-", "--", ":", "-.")
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_BROADEST = 24  # width of a name beside an axis, in lowercase letters


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line, or one colour of bars."""

    name: str
    color: int  # index that decides colour and marker
    x: tuple[float, ...] = ()
    y: tuple[float | None, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    dashed: bool = False

    @classmethod
    def of_metrics(
        cls, name: str, color: int, metrics: Sequence[Metric | None], x: Sequence[float] = ()
    ) -> Self:
        """Make a series of metrics with their intervals; None where one is missing."""
        return cls(
            name=name,
            color=color,
            x=tuple(x),
            y=tuple(metric.value if metric else None for metric in metrics),
            low=tuple(metric.low if metric else None for metric in metrics),
            high=tuple(metric.high if metric else None for metric in metrics),
        )


def lines(
    series: Sequence[Series], *, name: str, x_label: str, y_label: str = "", log_x: bool = False
) -> str:
    """Plot lines over numbers as an SVG, with intervals where they are given.

    Args:
        name: unique in the page; the prefix of the ids inside.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _drawing(name, 3.3, 2.4) as (figure, svg):
        axes = figure.add_subplot()
        for one in series:
            points = [place for place, value in enumerate(one.y) if value is not None]
            xs, ys = [one.x[place] for place in points], [one.y[place] for place in points]
            few = len(xs) <= 12
            axes.plot(
                xs,
                ys,
                color=_SLOTS[one.color % NUM_SLOTS],
                marker=_MARKS[one.color % len(_MARKS)] if few else None,
                markersize=4,
                linewidth=1.4,
                linestyle="--" if one.dashed else _STYLES[one.color // NUM_SLOTS % len(_STYLES)],
            )
            for x, y, low, high in zip(one.x, one.y, one.low, one.high, strict=False):
                if None not in (y, low, high):
                    axes.plot([x, x], [low, high], color=_SLOTS[one.color % NUM_SLOTS], linewidth=0.8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_x:
            ticks = sorted({x for one in series for x in one.x})
            axes.set_xscale("log")
            axes.set_xticks(_apart(ticks), [f"{tick:g}" for tick in _apart(ticks)])
            axes.minorticks_off()
    return svg[0]


def bars(names: Sequence[str], series: Sequence[Series], *, name: str, x_label: str) -> str:
    """Plot horizontal bars as an SVG: a group for each of `names` (the first on top), a bar for each series.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    thick = 0.8 / max(len(series), 1)
    height = 0.75 + len(names) * max(0.19, 0.105 * len(series) + 0.06)
    with _drawing(name, 3.3, height) as (figure, svg):
        axes = figure.add_subplot()
        for row, one in enumerate(series):
            for place, (value, low, high) in enumerate(zip_longest(one.y, one.low, one.high)):
                if value is None:
                    continue
                at = place + (row - (len(series) - 1) / 2) * thick
                axes.barh(at, value, height=thick * 0.92, color=_SLOTS[one.color % NUM_SLOTS], linewidth=0)
                if low is not None and high is not None:
                    axes.plot([low, high], [at, at], color=_INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), [_short(each) for each in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        if all((value or 0) >= 0 for one in series for value in one.y):
            axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
    return svg[0]


def scatter(points: Sequence[Series], *, name: str, x_label: str, y_label: str) -> str:
    """Plot points with their names and intervals as an SVG; the x axis is logarithmic.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _drawing(name, 5.2, 3.4) as (figure, svg):
        axes = figure.add_subplot()
        for one in points:
            colour = _SLOTS[one.color % NUM_SLOTS]
            axes.plot(one.x, one.y, color=colour, marker=_MARKS[one.color % len(_MARKS)], linestyle="")
            for x, y, low, high in zip(one.x, one.y, one.low, one.high, strict=False):
                if low is not None and high is not None:
                    axes.plot([x, x], [low, high], color=colour, linewidth=0.8)
                axes.annotate(_short(one.name), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.2)
        xs = sorted({x for one in points for x in one.x})
        axes.set_xticks(_apart(xs), [f"{x:.3g}" for x in _apart(xs)])
        axes.minorticks_off()
    return svg[0]


def draw_tradeoff(folder: Path, task: str) -> Path | None:
    """Plot a task's primary metric over images a second as an SVG in `folder`; None where no reports match.

    A report of the task matches a report of speed (whose primary metric is a rate) with the same weights, or
    of the same architecture untrained.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    reports = [entry.report for entry in read_reports(folder).values()]
    speeds = [report for report in reports if report.metrics[report.primary_metric].unit.endswith("/s")]
    pairs = [
        (quality, speed)
        for quality in reports
        if quality.task == task and (speed := _speed_of(quality, speeds)) is not None
    ]
    if not pairs:
        return None
    points = [
        Series.of_metrics(
            quality.model,
            place,
            [quality.metrics[quality.primary_metric]],
            [speed.metrics[speed.primary_metric].value],
        )
        for place, (quality, speed) in enumerate(pairs)
    ]
    first = pairs[0][0]
    label = f"{first.title or task} {first.primary_metric} ({first.metrics[first.primary_metric].unit})"
    svg = scatter(points, name="tradeoff", x_label="images a second", y_label=label)
    write_text(folder / TRADEOFF_FILE, _standalone(svg))
    return folder / TRADEOFF_FILE


def _speed_of(quality: Report, speeds: Sequence[Report]) -> Report | None:
    described = quality.metadata.get("model")
    student = described.get("student") if isinstance(described, Mapping) else None
    same = [report for report in speeds if report.fingerprint == quality.fingerprint]
    alike = [report for report in speeds if student is not None and report.model == student]
    return next(iter([*same, *alike]), None)


def _standalone(svg: str) -> str:
    """Turn a plot into a separate file that sets the colours for light and dark mode itself."""
    light, dark = (
        "".join(f"--s{place}:{colour};" for place, colour in enumerate(colours))
        for colours in (_LIGHT, _DARK)
    )
    style = (
        f"<style>svg{{--ink:#1d2226;--rule:#d9dcdf;{light}font:9px sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{--ink:#e6e9eb;--rule:#343c42;{dark}background:#14181b}}}}</style>"
    )
    head, end, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"{end}{style}{rest}\n'


@contextmanager
def _drawing(name: str, width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Yield a figure, and a list that holds its SVG afterwards."""
    require("matplotlib", extra="report")
    style = require("matplotlib.style", extra="report")
    figures = require("matplotlib.figure", extra="report")
    done: list[str] = []
    # After a reset: a matplotlibrc in the folder may request LaTeX, which runs programs.
    with style.context({**_SETTINGS, "svg.hashsalt": name}, after_reset=True):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        yield figure, done
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # The reader's own fonts draw the text; ours only measures it, without emoji.
            warnings.filterwarnings("ignore", message=".*missing from font")
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    done.append(_for_a_page(buffer.getvalue(), name))


def _for_a_page(svg: bytes, name: str) -> str:
    """Reduce matplotlib's SVG to what a page needs, with unique ids and the page's colours."""
    root = Xml.fromstring(svg)
    view = root.get("viewBox", "")
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):  # a style would apply to the whole page
                parent.remove(child)
    used = _references(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        target = element.attrib.pop(_XLINK, None)
        if target is not None:
            element.set("href", f"#{name}-{target.removeprefix('#')}")
        for key, value in element.attrib.items():
            if key in ("style", "fill", "stroke"):
                element.set(key, _colours(value))
            elif key == "clip-path":
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.attrib.clear()
    root.set("viewBox", view)
    return Xml.tostring(root, encoding="unicode")


def _references(root: Xml.Element) -> frozenset[str]:
    targets: set[str] = set()
    for element in root.iter():
        if _XLINK in element.attrib:
            targets.add(element.attrib[_XLINK].removeprefix("#"))
        targets.update(re.findall(r"url\(#([^)]+)\)", element.get("clip-path", "")))
    return frozenset(targets)


def _colours(style: str) -> str:
    style = re.sub(r"font-family: [^;]+;?|(?<=px) '[^;]+", "", style)
    return re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), style)


def _short(name: str) -> str:
    """Shorten a name to fit beside an axis, with characters that XML can hold."""
    letters = "".join(each if each.isprintable() else " " for each in name)
    if sum(map(_breadth, letters)) <= _BROADEST:
        return letters
    kept, breadth = "", _breadth("…")
    for letter in letters:
        breadth += _breadth(letter)
        if breadth > _BROADEST:
            break
        kept += letter
    return f"{kept}…"


def _breadth(letter: str) -> float:
    """Estimate the width of a letter, in lowercase letters."""
    if unicodedata.east_asian_width(letter) in "WF":
        return 2.0
    return 1.6 if letter in "mwMW" else 1.25 if letter.isupper() else 1.0


def _apart(ticks: Sequence[float]) -> list[float]:
    """Select the ticks that are far enough apart on a logarithmic axis to be read."""
    if len(ticks) < 2:
        return list(ticks)
    kept = [ticks[0]]
    for _, tick in pairwise(ticks):
        if tick > 1.25 * kept[-1]:
            kept.append(tick)
    return kept

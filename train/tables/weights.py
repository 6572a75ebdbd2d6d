"""The weights of the balanced losses over time, for table 3."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from radio.errors import require, shown
from radio.io import write_bytes, write_text

from ..loggers import LOG, read_records, say


class WeightCurve(NamedTuple):
    """The weight of one loss of one teacher in one run."""

    run: str
    teacher: str
    kind: str  # summary or spatial
    steps: tuple[int, ...]
    weights: tuple[float, ...]


def show_weights(runs: Mapping[str, Path], out: Path, console: Console) -> None:
    """Print the weights at five steps, and write `weights.csv` and `weights.svg` to `out`.

    Args:
        runs: run folders by name; those without weights in the log are skipped.
        out: folder of the files.
        console: where to print.

    Raises:
        MissingExtraError: matplotlib is not installed; the CSV is still written.
    """
    curves = [curve for name, folder in runs.items() for curve in read_weights(name, folder)]
    if not curves:
        return
    longest = max((curve.steps for curve in curves), key=len)
    steps = list(dict.fromkeys(longest[round(part * (len(longest) - 1) / 4)] for part in range(5)))
    table = _table(console, "weight at step", map(str, steps))
    for curve in curves:
        weights = dict(zip(curve.steps, curve.weights, strict=True))
        cells = (f"{weights[step]:.3f}" if step in weights else "" for step in steps)
        table.add_row(Text(shown(f"{curve.run}: {curve.teacher} {curve.kind}")), *cells)
    console.print(table)
    write_text(out / "weights.csv", as_csv(curves))
    write_bytes(out / "weights.svg", as_svg(curves))
    say(console, f"weights over time: {out / 'weights.svg'}, {out / 'weights.csv'}")


def read_weights(name: str, folder: Path) -> list[WeightCurve]:
    """Read the curves from a run folder's log; empty when its balancer has fixed weights."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(folder / LOG):
        for key, value in record.items():
            if key.endswith("_weight") and "/" in key and isinstance(value, (int, float)):
                points.setdefault(key, []).append((int(record["step"] or 0), float(value)))
    curves = []
    for key, pairs in points.items():
        teacher, kind = key.removesuffix("_weight").rsplit("/", 1)
        steps, weights = zip(*pairs, strict=True)
        curves.append(WeightCurve(name, teacher, kind, steps, weights))
    return curves


def as_csv(curves: Sequence[WeightCurve]) -> str:
    """Format the curves as CSV with one line per run, teacher, loss and step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "teacher", "loss", "step", "weight"))
    for curve in curves:
        for step, weight in zip(curve.steps, curve.weights, strict=True):
            writer.writerow((curve.run, curve.teacher, curve.kind, step, f"{weight:.6g}"))
    return text.getvalue()


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's palette
_LINES = {"summary": "-", "spatial": "--"}
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "weights", "font.size": 9, "legend.frameon": False}


def as_svg(curves: Sequence[WeightCurve]) -> bytes:
    """Plot a panel per run: a colour per teacher, solid lines for summaries, dashed lines for tokens.

    The output is deterministic: the same curves give the same bytes. The report page's plots have neither
    panels nor legends, so this one is drawn here.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="report")
    style = require("matplotlib.style", extra="report")
    figures = require("matplotlib.figure", extra="report")
    runs = list(dict.fromkeys(curve.run for curve in curves))
    teachers = list(dict.fromkeys(curve.teacher for curve in curves))
    buffer = io.BytesIO()
    with style.context(_STYLE, after_reset=True):  # ignore a matplotlibrc in the working folder
        figure = figures.Figure(figsize=(3.2 * len(runs), 2.8), layout="constrained")
        for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            for curve in (each for each in curves if each.run == run):
                colour = _COLOURS[teachers.index(curve.teacher) % len(_COLOURS)]
                label = f"{curve.teacher} {curve.kind}".replace("$", r"\$")  # not a formula
                axes.plot(curve.steps, curve.weights, color=colour, linestyle=_LINES[curve.kind], label=label)
            axes.set(title=run, xlabel="step", ylim=(0, None))
            axes.legend(fontsize=7)
        figure.axes[0].set_ylabel("weight of the loss")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _table(console: Console, title: str, columns: Iterable[str]) -> Table:
    """Make a table with a column of names and columns of numbers."""
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII)
    table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table

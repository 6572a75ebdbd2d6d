"""Many nights' reports as one page: primary metrics over time, and the commits between which they jumped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.core.report import Metric, Report
from evals.core.tables import cell as words
from radio.errors import DataError, require
from radio.io import write_text

from .blocks import Block, Cell, Column, Grid, LegendEntry, Panel, Plots, Section
from .compare import is_report, protocol, read_reports
from .figures import Series, lines
from .html import Page, render
from .records import Entry
from .sections import machine_settings

Line = tuple[str, str]  # task, model


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The reports of one night."""

    name: str
    created: str
    commit: str
    entries: Mapping[Line, Entry]


@dataclass(frozen=True, kw_only=True, slots=True)
class Jump:
    """A primary metric that moved by more than the tolerance from one night to the next that has it."""

    task: str
    model: str
    metric: str
    before: Metric
    after: Metric
    nights: tuple[str, str]
    commits: tuple[str, str]


def read_nights(root: Path) -> list[Snapshot]:
    """Read the folders below `root` that hold reports, the oldest first.

    Raises:
        DataError: no such folder, fewer than two nights, or a damaged report.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of nights")
    folders = sorted({path.parent for path in root.rglob("*.json") if is_report(path)})
    nights = [_night(root, folder) for folder in folders]
    if len(nights) < 2:
        raise DataError(
            f"{root}: holds {len(nights)} nights, and a trend needs two; wanted one folder of reports a night"
        )
    return sorted(nights, key=lambda night: (night.created, night.name))


def find_jumps(nights: Sequence[Snapshot], tolerance: float) -> list[Jump]:
    """Find where a primary metric moved by more than `tolerance`, in the order of the nights.

    Nights whose settings or data differ are not compared: a new protocol is not a jump.
    """
    found, last = [], dict[Line, tuple[Snapshot, Report]]()
    for night in nights:
        for line, entry in night.entries.items():
            report = entry.report
            known = last.get(line)
            last[line] = (night, report)
            if known is None or not _alike(known[1], report):
                continue
            before, after = known[1].metrics.get(report.primary_metric), report.metrics[report.primary_metric]
            if before is not None and abs(after.value - before.value) > tolerance:
                found.append(
                    Jump(
                        task=line[0],
                        model=line[1],
                        metric=report.primary_metric,
                        before=before,
                        after=after,
                        nights=(known[0].name, night.name),
                        commits=(known[0].commit, night.commit),
                    )
                )
    return found


def _alike(before: Report, after: Report) -> bool:
    free = machine_settings([before, after])
    return protocol(before, free) == protocol(after, free)


def write_trend(root: Path, path: Path, tolerance: float) -> tuple[int, list[Jump]]:
    """Write the page atomically; return its size in bytes and the jumps.

    Raises:
        DataError: as `read_nights`.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, extra="report")
    nights = read_nights(root)
    jumps = find_jumps(nights, tolerance)
    text = render(_page(root, nights, jumps, tolerance))
    write_text(path, text)
    return len(text.encode()), jumps


def _night(root: Path, folder: Path) -> Snapshot:
    entries = read_reports(folder)
    reports = [entry.report for entry in entries.values()]
    commits = sorted({report.git for report in reports if report.git})
    return Snapshot(
        name=folder.relative_to(root).as_posix(),
        created=min(report.created for report in reports),
        commit=", ".join(commit[:10] for commit in commits),
        entries=entries,
    )


def _page(root: Path, nights: Sequence[Snapshot], jumps: Sequence[Jump], tolerance: float) -> Page:
    tasks = list(dict.fromkeys(task for night in nights for task, _ in night.entries))
    first, last = nights[0].created[:10], nights[-1].created[:10]
    overview = Section(anchor="jumps", title="jumps", blocks=(_jump_grid(jumps, tolerance),))
    sections = [Section(anchor=task, title=task, blocks=(_plot(nights, task),)) for task in tasks]
    return Page(
        title=f"{root.resolve().name}: trend",
        subtitle=f"{len(nights)} nights, {first} to {last}",
        overview=overview,
        sections=(*sections, Section(anchor="nights", title="nights", blocks=(_night_grid(nights),))),
    )


def _jump_grid(jumps: Sequence[Jump], tolerance: float) -> Grid:
    rows = tuple(
        (
            Cell(text=jump.nights[1]),
            Cell(text=jump.task),
            Cell(text=jump.model),
            Cell(text=jump.metric),
            Cell(text=words(jump.before), order=jump.before.value),
            Cell(text=words(jump.after), order=jump.after.value),
            Cell(
                text=f"{jump.after.value - jump.before.value:+.1f}",
                order=jump.after.value - jump.before.value,
            ),
            Cell(text=f"{jump.commits[0] or '?'} → {jump.commits[1] or '?'}"),
        )
        for jump in reversed(jumps)
    )
    names = ("task", "model", "metric")
    moved = f"moved by more than {tolerance:g} from one night to the next"
    return Grid(
        caption=f"Primary metrics that {moved}, the newest first." if rows else f"No primary metric {moved}.",
        columns=(
            Column(name="night", numeric=False),
            *(Column(name=name, numeric=False) for name in names),
            *(Column(name=name) for name in ("before", "after", "difference")),
            Column(name="commits", numeric=False),
        ),
        rows=rows,
    )


def _plot(nights: Sequence[Snapshot], task: str) -> Block:
    models = list(dict.fromkeys(model for night in nights for name, model in night.entries if name == task))
    series, primary_metric = [], ""
    for color, model in enumerate(models):
        metrics: list[Metric | None] = []
        for night in nights:
            entry = night.entries.get((task, model))
            primary_metric = entry.report.primary_metric if entry else primary_metric
            metrics.append(entry.report.metrics[entry.report.primary_metric] if entry else None)
        series.append(
            Series(
                name=model,
                color=color,
                x=tuple(float(number) for number in range(1, len(nights) + 1)),
                y=tuple(metric.value if metric else None for metric in metrics),
                low=tuple(metric.low if metric else None for metric in metrics),
                high=tuple(metric.high if metric else None for metric in metrics),
            )
        )
    svg = lines(series, name=f"trend-{task}", x_label="night", y_label=primary_metric)
    return Plots(
        caption=f"{primary_metric}, night by night, with 95 % intervals.",
        panels=(Panel(title=primary_metric, svg=svg),),
        legend=tuple(LegendEntry(name=model, color=slot) for slot, model in enumerate(models)),
    )


def _night_grid(nights: Sequence[Snapshot]) -> Grid:
    return Grid(
        caption="The nights, with the commits of their reports.",
        columns=(
            Column(name="number"),
            *(Column(name=name, numeric=False) for name in ("night", "made", "commit")),
            Column(name="reports"),
        ),
        rows=tuple(
            (
                Cell(text=str(number), order=number),
                Cell(text=night.name),
                Cell(text=night.created),
                Cell(text=night.commit),
                Cell(text=str(len(night.entries)), order=len(night.entries)),
            )
            for number, night in enumerate(nights, start=1)
        ),
    )

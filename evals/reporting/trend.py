"""Many nights' reports as one page: primary metrics over time, and the commits between which they jumped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.core.report import Metric, Report, metric_text
from radio.errors import DataError, require
from radio.io import write_text

from .compare import StoredReport, is_report, protocols, read_reports
from .elements import Cell, Grid, Page, Plots, Row, Section, grid
from .figures import Series, lines
from .page import render

Line = tuple[str, str]  # task, model


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The reports of one night."""

    name: str
    created: str
    commit: str
    entries: Mapping[Line, StoredReport]


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
            f"{root}: holds {len(nights)} nights, and a trend needs two; give one folder of reports a night"
        )
    return sorted(nights, key=lambda night: (night.created, night.name))


def find_jumps(nights: Sequence[Snapshot], tolerance: float) -> list[Jump]:
    """Find where a primary metric moved by more than `tolerance`, in the order of the nights.

    Nights whose settings or data differ are not compared: a new protocol is not a jump.
    """
    jumps, last = [], dict[Line, tuple[Snapshot, Report]]()
    for night in nights:
        for line, entry in night.entries.items():
            report = entry.report
            previous = last.get(line)
            last[line] = (night, report)
            if previous is None:
                continue
            protocol_before, protocol = protocols([previous[1], report])
            before = previous[1].metrics.get(report.primary_metric)
            after = report.metrics[report.primary_metric]
            if (
                protocol == protocol_before
                and before is not None
                and abs(after.value - before.value) > tolerance
            ):
                jumps.append(
                    Jump(
                        task=line[0],
                        model=line[1],
                        metric=report.primary_metric,
                        before=before,
                        after=after,
                        nights=(previous[0].name, night.name),
                        commits=(previous[0].commit, night.commit),
                    )
                )
    return jumps


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
    plots = [
        Section(anchor=f"task-{number}", title=task, elements=(_plot(nights, task, f"trend-{number}"),))
        for number, task in enumerate(tasks)
    ]
    return Page(
        title=f"{root.resolve().name}: trend",
        subtitle=f"{len(nights)} nights, {first} to {last}",
        sections=(
            Section(anchor="jumps", title="jumps", elements=(_jump_grid(jumps, tolerance),)),
            *plots,
            Section(anchor="nights", title="nights", elements=(_night_grid(nights),)),
        ),
    )


def _jump_grid(jumps: Sequence[Jump], tolerance: float) -> Grid:
    rows: list[Row] = []
    for jump in reversed(jumps):
        difference = jump.after.value - jump.before.value
        rows.append(
            (
                *(jump.nights[1], jump.task, jump.model, jump.metric),
                *(Cell(text=metric_text(m), order=m.value) for m in (jump.before, jump.after)),
                Cell(text=f"{difference:+.1f}", order=difference),
                f"{jump.commits[0] or '?'} → {jump.commits[1] or '?'}",
            )
        )
    moved = f"moved by more than {tolerance:g} from one night to the next"
    return grid(
        f"Primary metrics that {moved}, the newest first." if rows else f"No primary metric {moved}.",
        ("night", "task", "model", "metric", "before", "after", "difference", "commits"),
        rows,
    )


def _plot(nights: Sequence[Snapshot], task: str, name: str) -> Plots:
    models = list(dict.fromkeys(model for night in nights for other, model in night.entries if other == task))
    series, primary_metric = [], ""
    for color, model in enumerate(models):
        metrics: list[Metric | None] = []
        for night in nights:
            entry = night.entries.get((task, model))
            primary_metric = entry.report.primary_metric if entry else primary_metric
            metrics.append(entry.report.metrics[entry.report.primary_metric] if entry else None)
        series.append(Series.of_metrics(model, color, metrics, range(1, len(nights) + 1)))
    svg = lines(series, name=name, x_label="night", y_label=primary_metric)
    return Plots(
        caption=f"{primary_metric}, night by night, with 95 % intervals.",
        panels=((primary_metric, svg),),
        legend=tuple((model, color) for color, model in enumerate(models)),
    )


def _night_grid(nights: Sequence[Snapshot]) -> Grid:
    return grid(
        "The nights, with the commits of their reports.",
        ("number", "night", "made", "commit", "reports"),
        [
            (number, night.name, night.created, night.commit, len(night.entries))
            for number, night in enumerate(nights, start=1)
        ],
    )

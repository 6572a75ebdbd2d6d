"""A folder of reports as one HTML file that works anywhere: no network, no other file, any browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.core.paper import DATA, HEADLINE, PRIMARY, TASKS, rows_for
from evals.core.report import Kind, Metric, Report
from radio.errors import ConfigError, require
from radio.io import write_text

from .compare import differences, read_reports, setting_text
from .curves import curves_section
from .drawing import TaskReports
from .elements import (
    Cell,
    Collapsible,
    Element,
    Grid,
    ImageBudget,
    Page,
    Row,
    Section,
    grid,
    metric_cells,
    notes,
)
from .figures import Series, bars
from .paper_tables import read_tables, tables_section

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_COLUMNS = 12  # metrics side by side
_MOST_SKIPPED = 10


def write_page(folder: Path, path: Path, *, run: Path | None = None, tables: Path | None = None) -> int:
    """Write the page of a folder of reports atomically; return its size in bytes.

    Args:
        folder: of reports, with the files that they name.
        path: the HTML file.
        run: a run folder of the trainer, for its training curves.
        tables: a file of the paper's tables made again, which the trainer wrote.

    Raises:
        DataError: a folder without reports, a damaged report or file of tables, or a run folder without
            metrics.
        ConfigError: a path that is a folder.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, extra="report")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the HTML file, such as {path / 'report.html'}")
    text = render(make_page(folder, run=run, tables=tables))
    write_text(path, text)
    return len(text.encode())


def make_page(folder: Path, *, run: Path | None = None, tables: Path | None = None) -> Page:
    """Build the page's content, the models always in the same order and colors; see `write_page`."""
    entries = list(read_reports(folder).values())
    reports = [entry.report for entry in entries]
    training = [] if run is None else [curves_section(run)]
    tasks, models = sorted_tasks(reports), gather(reports)
    names = [(name, color) for color, model in enumerate(models) for name in (model.name, *model.also)]
    colors, order = dict(names), [name for name, _ in names]
    image_budget = ImageBudget()
    sections = [
        Section(anchor="overview", title="every model on every task", elements=(overview(models, tasks),))
    ]
    for number, task in enumerate(tasks):
        plain = re.fullmatch("[a-z0-9_-]+", task)
        of_task = sorted(
            (entry for entry in entries if entry.report.task == task),
            key=lambda entry: order.index(entry.report.model),
        )
        scored = TaskReports(
            anchor=f"task-{task}" if plain else f"other-{number}",
            entries=tuple(of_task),
            colors=colors,
            image_budget=image_budget,
        )
        sections.append(section_of(task, scored))
    sections += training
    sections += [] if tables is None else [tables_section(read_tables(tables))]
    if image_budget.left_out:
        text = f"{image_budget.left_out} images are left out: the page would be too large with them"
        sections.append(Section(anchor="left-out", title="left out", elements=notes([text])))
    days = sorted({report.created[:10] for report in reports})
    return Page(
        title="/".join(folder.resolve().parts[-2:]).lstrip("/"),
        subtitle=f"{len(reports)} reports, made {' to '.join(dict.fromkeys((days[0], days[-1])))}",
        sections=tuple(sections),
    )


def section_of(task: str, scored: TaskReports) -> Section:
    """Build the section of a task."""
    reports = scored.reports
    drawn = scored.draw()
    remarks = [f"{report.model}: {note}" for report in reports for note in report.notes]
    details = tuple(
        Collapsible(summary=report.model, elements=(_details(task, report),)) for report in reports
    )
    elements: list[Element] = [
        _metrics(reports),
        *notes([*remarks, *differences(reports), *scored.warnings]),
        *drawn,
        *_rates(scored),
        *_paper(task),
        Collapsible(summary="how each report was made: settings, data, versions", elements=details),
    ]
    return Section(anchor=scored.anchor, title=title_of(task, reports), elements=tuple(elements))


def _metrics(reports: Sequence[Report]) -> Grid:
    """Build a table of models by metrics; with many metrics, the metrics are the rows."""
    first = [report.primary_metric for report in reports]
    names = list(dict.fromkeys([*first, *(name for report in reports for name in report.metrics)]))
    units = [next(r.metrics[name].unit for r in reports if name in r.metrics) for name in names]
    cells = [metric_cells([report.metrics.get(name) for report in reports]) for name in names]
    models = [report.model for report in reports]
    used = dict.fromkeys(f"{data.role} {data.name} ({data.count})" for r in reports for data in r.data)
    caption = f"All metrics, on {'; '.join(used)}." if used else "All metrics."
    rows: list[Row]
    if len(names) <= _MOST_COLUMNS:
        rows = [(model, *(column[place] for column in cells)) for place, model in enumerate(models)]
        return grid(caption, ("model", *zip(names, units, strict=True)), rows)
    labels = [f"{name} ({unit})" if unit else name for name, unit in zip(names, units, strict=True)]
    return grid(
        caption, ("metric", *models), [(label, *row) for label, row in zip(labels, cells, strict=True)]
    )


def _rates(scored: TaskReports) -> list[Element]:
    """Draw bars of the metrics with a unit per second; empty without any."""
    units = {
        name: metric.unit
        for report in scored.reports
        for name, metric in report.metrics.items()
        if metric.unit.endswith("/s")
    }
    if not units:
        return []
    series = [
        Series.of_metrics(
            report.model, scored.colors[report.model], [report.metrics.get(name) for name in units]
        )
        for report in scored.reports
    ]
    svg = bars(
        [name.removesuffix("_rate") for name in units],
        series,
        name=f"{scored.anchor}-rates",
        x_label=" and ".join(dict.fromkeys(units.values())),
    )
    caption = "Speed, on the machine that each report names: compare within one run only."
    return [scored.plot("speed", svg, caption)]


def _paper(task: str) -> list[Element]:
    """Build the paper's results for a task, collapsed; empty for tasks that it does not have."""
    rows = rows_for(task)
    if not rows:
        return []
    names = (*TASKS[task], "images_per_second")
    heads = ((name.replace("_", " "), DATA[name]) for name in names)
    table = grid(
        "The paper's numbers, on its own data and machines: not measured by this program.",
        ("model (paper)", "kind", *heads, "source"),
        [
            (
                Cell(text=row.model, small=row.remark),
                row.kind,
                *(row.values.get(name) for name in names),
                row.source,
            )
            for row in rows
        ],
        digits=2,
    )
    return [Collapsible(summary="what the paper reports", elements=(table,))]


def _details(task: str, report: Report) -> Grid:
    """Build a table of everything that is needed to repeat a report."""
    rows = [
        ("weights", report.fingerprint or "none"),
        ("made", report.created),
        ("device", report.device),
        ("commit", report.git or "unknown"),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())),
        *((f"setting {name}", setting_text(value)) for name, value in _flat(report.settings)),
        *((f"version of {name}", value) for name, value in report.versions.items()),
    ]
    for used in report.data:
        text = f"{used.name}: {used.count} used, {used.num_classes} classes, sha256 {used.fingerprint}"
        rows.append((f"data, {used.role}", text))
        skipped = used.skipped[:_MOST_SKIPPED]
        rows += [(f"could not be read: {image.key}", image.reason) for image in skipped]
        if len(used.skipped) > _MOST_SKIPPED:
            rows.append(("could not be read", f"and {len(used.skipped) - _MOST_SKIPPED} more"))
    caption = f"{title_of(task, [report])} of {report.model}: how it was made"
    return grid(caption, ("what", "value"), rows)


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List the settings, then the resolved ones; those without a value are left out."""
    listed = [(name, value) for name, value in settings.items() if name != "resolved" and value is not None]
    resolved = settings.get("resolved")
    if isinstance(resolved, Mapping):
        listed += [(f"{name} (resolved)", value) for name, value in resolved.items()]
    return listed


def render(page: Page) -> str:
    """Render a page as HTML.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "sort.js").read_text(encoding="utf-8")
    text: str = environment.get_template("page.html.j2").render(
        page=page,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_TEMPLATES / "style.css").read_text(encoding="utf-8"),
    )
    return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written


_FEW = 2  # data sets that a column's head can name
_KIND_ORDER: tuple[Kind, ...] = ("student", "teacher", "untrained")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One model, by all the names that its reports use."""

    name: str
    also: tuple[str, ...]
    kind: Kind
    reports: tuple[Report, ...]


def title_of(task: str, reports: Sequence[Report]) -> str:
    """Return a task's name for people, as its reports say."""
    return next((report.title for report in reports if report.task == task and report.title), task)


def sorted_tasks(reports: Sequence[Report]) -> list[str]:
    """Return the tasks of the reports: the paper's in its order, then others by name."""
    order = list(TASKS)
    tasks = {report.task for report in reports}
    return sorted(tasks, key=lambda task: (order.index(task) if task in order else len(order), task))


def gather(reports: Sequence[Report]) -> list[Model]:
    """Group the reports by model: students first, then teachers, then untrained ones, by name.

    Two names are one model when the weights are the same and no task was scored under both (the table after
    a training calls the student `student`, later commands call it by its run). A name with an ending, such
    as `demo-clip-head`, is another way of scoring and keeps its row.
    """
    by_name: dict[str, list[Report]] = {}
    for report in reports:
        by_name.setdefault(report.model, []).append(report)
    groups: list[list[str]] = []
    for name in sorted(by_name):
        same = next((group for group in groups if _same(name, group, by_name)), None)
        if same is None:
            groups.append([name])
        else:
            same.append(name)
    models = []
    for group in groups:
        name = max(group, key=lambda each: (len(by_name[each]), each))  # the one with most reports
        own = tuple(report for each in group for report in by_name[each])
        kind = max((report.kind for report in own), key=_KIND_ORDER.index)
        also = tuple(each for each in group if each != name)
        models.append(Model(name=name, also=also, kind=kind, reports=own))
    return sorted(models, key=lambda model: (_KIND_ORDER.index(model.kind), model.name))


def _same(name: str, group: Sequence[str], by_name: Mapping[str, Sequence[Report]]) -> bool:
    ours = by_name[name]
    theirs = [report for other in group for report in by_name[other]]
    fingerprints = {report.fingerprint for report in (*ours, *theirs)}
    endings = any(name.startswith(f"{other}-") for other in group)
    tasks = {report.task for report in ours} & {report.task for report in theirs}
    return len(fingerprints) == 1 and "" not in fingerprints and not endings and not tasks


@dataclass(frozen=True, slots=True)
class _Column:
    """The content of one column: a task's primary metric on the same data."""

    task: str
    primary_metric: str
    unit: str
    data: str

    @classmethod
    def of(cls, report: Report) -> _Column:
        scored = [data for data in report.data if data.scored] or report.data[-1:]
        text = "; ".join(f"{data.name}, {data.count}" for data in scored)
        if len(scored) > _FEW:
            text = f"{len(scored)} data sets, {sum(data.count for data in scored)}"
        return cls(report.task, report.primary_metric, report.metrics[report.primary_metric].unit, text)

    def find(self, model: Model) -> Metric | None:
        for report in model.reports:
            if _Column.of(report) == self:
                return report.metrics[report.primary_metric]
        return None

    @property
    def paper(self) -> str:
        """The paper's column of this metric; empty where it has none."""
        metric, column = PRIMARY.get(self.task, ("", ""))
        return column if metric == self.primary_metric else ""


def overview(models: Sequence[Model], tasks: Sequence[str]) -> Grid:
    """Build the table of models by tasks' primary metrics, with baselines and the paper's rows below."""
    reports = [
        report for task in tasks for model in models for report in model.reports if report.task == task
    ]
    columns = list(dict.fromkeys(_Column.of(report) for report in reports))
    cells = [metric_cells([column.find(model) for model in models]) for column in columns]
    rows = [
        (
            Cell(text=model.name, small=f"also {', '.join(model.also)}" if model.also else ""),
            model.kind,
            *(column[place] for column in cells),
        )
        for place, model in enumerate(models)
    ]
    heads = [
        (f"{title_of(each.task, reports)}: {each.primary_metric} ({each.unit})", each.data)
        for each in columns
    ]
    return grid(
        "Every model on every task. ± is half of a 95 % interval; the best of a column is bold.",
        ("model", "kind", *heads),
        rows,
        fixed=(*_baseline(columns, reports), *_paper_rows(columns)),
    )


def _baseline(columns: Sequence[_Column], reports: Sequence[Report]) -> list[Row]:
    """Build the row of scores without a model, with how they are reached: a report's first baseline."""
    cells = []
    for column in columns:
        same = [report for report in reports if _Column.of(report) == column and report.baselines]
        name, value = next(iter(same[0].baselines.items())) if same else ("", None)
        text = "" if value is None else f"{value:.1f}"
        cells.append(Cell(text=text, order=value, small=name.replace("_", " ")))
    if not any(cell.text for cell in cells):
        return []
    return [(Cell(text="baseline", small="without the model"), "baseline", *cells)]


def _paper_rows(columns: Sequence[_Column]) -> list[Row]:
    rows: list[Row] = []
    for row in HEADLINE:
        values = [(row.values.get(column.paper), column.paper) for column in columns]
        cells = [
            Cell() if value is None else Cell(text=f"{value:.2f}", order=value, small=DATA[name])
            for value, name in values
        ]
        if any(cell.text for cell in cells):
            rows.append((Cell(text=row.model, small=row.source), "paper", *cells))
    return rows

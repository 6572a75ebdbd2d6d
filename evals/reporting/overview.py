"""Every model on every task: the table that the page begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evals.core.paper import DATA, HEADLINE, PRIMARY, TASKS
from evals.core.report import Kind, Metric, Report

from .elements import Cell, Grid, Row, grid, metric_cells

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
    models = [_model(group, by_name) for group in groups]
    return sorted(models, key=lambda model: (_KIND_ORDER.index(model.kind), model.name))


def _same(name: str, group: Sequence[str], by_name: Mapping[str, Sequence[Report]]) -> bool:
    ours = by_name[name]
    theirs = [report for other in group for report in by_name[other]]
    fingerprints = {report.fingerprint for report in (*ours, *theirs)}
    endings = any(name.startswith(f"{other}-") for other in group)
    tasks = {report.task for report in ours} & {report.task for report in theirs}
    return len(fingerprints) == 1 and "" not in fingerprints and not endings and not tasks


def _model(names: Sequence[str], by_name: Mapping[str, Sequence[Report]]) -> Model:
    name = max(names, key=lambda each: (len(by_name[each]), each))  # the one with most reports
    reports = tuple(report for each in names for report in by_name[each])
    return Model(
        name=name,
        also=tuple(each for each in names if each != name),
        kind=max((report.kind for report in reports), key=_KIND_ORDER.index),
        reports=reports,
    )


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
        fixed=(*_baseline(columns, reports), *_paper(columns)),
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


def _paper(columns: Sequence[_Column]) -> list[Row]:
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

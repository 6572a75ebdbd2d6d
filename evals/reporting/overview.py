"""Every model on every task: the table that the page begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evals.core.paper import DATA, HEADLINE, TASKS
from evals.core.report import Metric, Report
from radio.teachers import families

from .blocks import Cell, Column, Grid, best_of, metric_cell

Kind = Literal["student", "teacher", "untrained"]

TITLES: Mapping[str, str] = {
    "knn": "k-NN",
    "zeroshot": "zero-shot",
    "seg": "segmentation probe",
    "sam": "SAM drop-in",
    "vqa": "visual question answering",
    "throughput": "throughput",
}
_LEARNED_FROM = frozenset({"bank", "train", "pretrain", "instruct"})  # roles of data
_FEW = 2  # data sets that a column's head can name
_TASK_ORDER = list(TITLES)
_KIND_ORDER: tuple[Kind, ...] = ("student", "teacher", "untrained")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One model, by all the names that its reports use."""

    name: str
    also: tuple[str, ...]
    kind: Kind
    reports: tuple[Report, ...]


def title_of(task: str) -> str:
    """Return a task's name for people."""
    return TITLES.get(task, task)


def sorted_tasks(reports: Sequence[Report]) -> list[str]:
    """Return the tasks of the reports: ours in a fixed order, then others by name."""
    there = {report.task for report in reports}
    return sorted(there, key=lambda task: (_TASK_ORDER.index(task) if task in TITLES else len(TITLES), task))


def kind_of(label: str) -> Kind:
    """Infer the kind of a model from its name in a report."""
    if "untrained" in label:
        return "untrained"
    family, colon, _ = label.partition(":")
    return "teacher" if colon and family in families else "student"


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
        home = next((group for group in groups if _same(name, group, by_name)), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    models = [_model(group, by_name) for group in groups]
    return sorted(models, key=lambda model: (_KIND_ORDER.index(model.kind), model.name))


def _same(name: str, group: Sequence[str], by_name: Mapping[str, Sequence[Report]]) -> bool:
    mine = by_name[name]
    theirs = [report for other in group for report in by_name[other]]
    prints = {report.fingerprint for report in (*mine, *theirs)}
    endings = any(name.startswith(f"{other}-") for other in group)
    tasks = {report.task for report in mine} & {report.task for report in theirs}
    return len(prints) == 1 and "" not in prints and not endings and not tasks


def _model(names: Sequence[str], by_name: Mapping[str, Sequence[Report]]) -> Model:
    name = max(names, key=lambda each: (len(by_name[each]), each))  # the one with most reports
    kinds = {kind_of(each) for each in names}
    return Model(
        name=name,
        also=tuple(each for each in names if each != name),
        kind=next(kind for kind in reversed(_KIND_ORDER) if kind in kinds),
        reports=tuple(report for each in names for report in by_name[each]),
    )


@dataclass(frozen=True, slots=True)
class _Column:
    """The content of one column: a task's primary metric on the same data."""

    task: str
    primary_metric: str
    unit: str
    data: str

    def find(self, model: Model) -> Metric | None:
        for report in model.reports:
            if _column(report) == self:
                return report.metrics[report.primary_metric]
        return None


def overview(models: Sequence[Model], tasks: Sequence[str]) -> Grid:
    """Build the table of models by tasks' primary metrics, with baselines and the paper's rows below."""
    reports = [
        report for task in tasks for model in models for report in model.reports if report.task == task
    ]
    contests = list(dict.fromkeys(_column(report) for report in reports))
    found = [[contest.find(model) for contest in contests] for model in models]
    best = [best_of(column) for column in zip(*found, strict=True)]
    rows = [
        (
            Cell(text=model.name, small=f"also {', '.join(model.also)}" if model.also else ""),
            Cell(text=model.kind),
            *(metric_cell(metric, best=top) for metric, top in zip(metrics, best, strict=True)),
        )
        for model, metrics in zip(models, found, strict=True)
    ]
    heads = [
        Column(name=f"{title_of(each.task)}: {each.primary_metric} ({each.unit})", small=each.data)
        for each in contests
    ]
    return Grid(
        caption="Every model on every task. ± is half of a 95 % interval; the best of a column is bold.",
        columns=(Column(name="model", numeric=False), Column(name="kind", numeric=False), *heads),
        rows=tuple(rows),
        fixed=(*_baseline(contests, reports), *_paper(contests)),
    )


def _column(report: Report) -> _Column:
    used = [data for data in report.data if data.role not in _LEARNED_FROM] or report.data[-1:]
    words = "; ".join(f"{data.name}, {data.count}" for data in used)
    if len(used) > _FEW:
        words = f"{len(used)} data sets, {sum(data.count for data in used)}"
    return _Column(report.task, report.primary_metric, report.metrics[report.primary_metric].unit, words)


def _baseline(contests: Sequence[_Column], reports: Sequence[Report]) -> list[tuple[Cell, ...]]:
    """Build the row of scores without a model."""
    cells = []
    for contest in contests:
        first = next(report for report in reports if _column(report) == contest)
        value, words = baseline_of(first)
        cells.append(Cell() if value is None else Cell(text=f"{value:.1f}", order=value, small=words))
    if not any(cell.text for cell in cells):
        return []
    return [(Cell(text="baseline", small="without the model"), Cell(text="baseline"), *cells)]


def baseline_of(report: Report) -> tuple[float | None, str]:
    """Return a task's score without the model, and how it is reached; None where it is unknown."""
    if report.task == "knn" and report.primary_metric == "top1":
        classes = max((data.num_classes for data in report.data), default=0)
        return (100 / classes, "chance") if classes else (None, "")
    if report.task == "zeroshot" and report.primary_metric == "top1":
        resolved = report.settings.get("resolved")
        chance: Any = resolved.get("chance") if isinstance(resolved, Mapping) else None
        return (float(chance), "chance") if isinstance(chance, (int, float)) else (None, "")
    other = {"sam": ("filled_box_miou", "filled box"), "vqa": ("blind_accuracy", "without the image")}
    name, words = other.get(report.task, ("", ""))
    metric = report.metrics.get(name)
    return (metric.value, words) if metric and report.primary_metric in ("miou", "accuracy") else (None, "")


def _paper(contests: Sequence[_Column]) -> list[tuple[Cell, ...]]:
    rows = []
    for row in HEADLINE:
        cells = []
        for contest in contests:
            column = _paper_column(contest)
            value = row.values.get(column)
            cells.append(
                Cell() if value is None else Cell(text=f"{value:.2f}", order=value, small=DATA[column])
            )
        if any(cell.text for cell in cells):
            rows.append((Cell(text=row.model, small=row.source), Cell(text="paper"), *cells))
    return rows


def _paper_column(contest: _Column) -> str:
    wanted = {"zeroshot": "top1", "knn": "top1", "seg": "miou", "sam": "miou"}.get(contest.task)
    return TASKS[contest.task][0] if wanted is not None and wanted == contest.primary_metric else ""

"""Many models ranked over many tasks, with groups that a paired bootstrap cannot resolve."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evals.core.report import Metric, Report, metric_text
from evals.core.stats import Values, interval
from radio.errors import ConfigError, DataError, did_you_mean, require, shown
from radio.io import write_text

from .compare import StoredReport, differences, protocols, read_reports, resampled_metrics, setting_text
from .elements import Cell, Page, Plots, Row, Section, grid, metric_cells, notes
from .figures import Series, bars
from .page import render, title_of

# Letters: M models, R resamples. The first row of an array [1 + R, M] is of the scores themselves.


@dataclass(frozen=True, slots=True)
class Column:
    """One task on one data set, with the same settings."""

    task: str
    metric: str
    data: str  # names and numbers of samples
    protocol: str  # settings and data that must be equal, as JSON

    @classmethod
    def of(cls, report: Report) -> Column:
        """Return the column that a report belongs to."""
        used = [data for data in report.data if data.scored] or report.data
        text = "; ".join(f"{data.name}, {data.count}" for data in used)
        (protocol,) = protocols([report])
        return cls(report.task, report.primary_metric, text, json.dumps(protocol, sort_keys=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedModel:
    """A model with its reports: all that are of the same weights."""

    name: str
    entries: Mapping[Column, StoredReport]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A model's place."""

    model: str
    rank_sum: float  # over the columns; of equal scores, and of missing ones, each gets their mean rank
    low: float
    high: float
    group: int  # from 1; the models of one cannot be resolved from its first
    metrics: tuple[Metric | None, ...]  # of each column
    groups: tuple[int | None, ...]  # within each column, where it can be paired


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaderboard:
    """The models in the order of their rank sums."""

    columns: tuple[Column, ...]
    titles: tuple[str, ...]  # of the columns
    standings: tuple[Standing, ...]
    notes: tuple[str, ...]


def read_all(folders: Sequence[Path]) -> list[StoredReport]:
    """Read the reports of several folders.

    Raises:
        DataError: no folder is given, one has no reports, or one is damaged.
    """
    if not folders:
        raise DataError("no folder of reports is given; name one or more")
    return [entry for folder in folders for entry in read_reports(folder).values()]


def gather_models(entries: Sequence[StoredReport]) -> tuple[list[RankedModel], dict[Column, list[str]]]:
    """Gather the reports of the same weights, except under names that share a column.

    So a report that is called `NAME-voc` for its data goes to NAME, and two windows of one model stay apart.
    Other weights of one name, such as the students of two runs, have their folder in the name.

    Returns:
        the models, and notes on a column's reports that another of the same weights and name replaces.

    Raises:
        DataError: two reports of one name in one column that differ and do not say of which weights they are.
    """
    by_weights: dict[str, dict[str, dict[Column, StoredReport]]] = {}
    remarks: dict[Column, list[str]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.report.model, str(entry.path))):
        report, column = entry.report, Column.of(entry.report)
        same = by_weights.setdefault(report.fingerprint or f"name {report.model}", {})
        own = same.setdefault(report.model, {})
        other = own.setdefault(column, entry)
        if _metric(other.report) == _metric(report):  # also where there is no other
            continue
        if not report.fingerprint:
            raise DataError(
                f"{shown(other.path)} and {shown(entry.path)} are both of {shown(report.task)} and "
                f"{shown(report.model)} on the same data; leave one out"
            )
        older, own[column] = sorted((other, entry), key=lambda each: each.report.created)
        remarks.setdefault(column, []).append(
            f"{shown(older.path)} is left out: {shown(own[column].path)} is newer and of the same weights"
        )
    models = []
    for names in by_weights.values():
        count = Counter(column for own in names.values() for column in own)
        apart = [name for name, own in names.items() if any(count[column] > 1 for column in own)]
        models += [RankedModel(name=name, entries=names[name]) for name in apart]
        together = [name for name in names if name not in apart]
        if together:
            joined = {column: entry for name in together for column, entry in names[name].items()}
            models.append(RankedModel(name=together[0], entries=joined))
    named = [model for name in {each.name for each in models} for model in _name_apart(name, models)]
    return sorted(named, key=lambda each: each.name), remarks


def _name_apart(name: str, models: Sequence[RankedModel]) -> list[RankedModel]:
    """Return the models of a name; of several each gets its run's folder, or what else tells them apart."""
    alike = [each for each in models if each.name == name]
    if len(alike) == 1:
        return alike
    first = [next(iter(each.entries.values())) for each in alike]
    folders = [entry.path.resolve().parent for entry in first]
    runs = [folder.parent if folder.name == "reports" else folder for folder in folders]  # as training has it
    endings = [run.name for run in runs]
    if len(set(endings)) < len(endings):
        endings = [str(run) for run in runs]
    if len(set(endings)) < len(endings):
        endings = [entry.report.fingerprint[:12] or "no weights" for entry in first]
    return [replace(each, name=f"{name} ({ending})") for each, ending in zip(alike, endings, strict=True)]


def make_leaderboard(entries: Sequence[StoredReport], tasks: Sequence[str] = ()) -> Leaderboard:
    """Rank the models of some reports by the sum of their ranks over tasks.

    A model that lacks a task shares its last place. Each resample draws the samples of every task anew, the
    same ones for all models; the interval of a rank sum, and whether two models differ, follow from those.

    Args:
        tasks: only these (default: all that two models or more have).

    Raises:
        ConfigError: a task that no report is of.
        DataError: nothing that two models have, or as `gather_models`.
    """
    known = list(dict.fromkeys(entry.report.task for entry in entries))
    for task in tasks:
        if task not in known:
            given = f"no report is of the task {shown(task)}, only of {', '.join(known)}"
            raise ConfigError(f"{given}{did_you_mean(task, known)}")
    models, replaced = gather_models([e for e in entries if not tasks or e.report.task in tasks])
    remarks: list[str] = []
    columns, scores = [], []
    for column in sorted(
        {c for each in models for c in each.entries}, key=lambda c: (c.task, c.data, c.protocol)
    ):
        reason = _unfit(column, models)
        if reason:
            remarks.append(f"{column.task} ({column.data}) is left out: {reason}")
            continue
        resampled, note = _scores(column, models)
        columns.append(column)
        scores.append(resampled)
        remarks += [*replaced.get(column, ()), *([note] if note else [])]
    if not columns:
        raise DataError(f"there is nothing to rank: {'; '.join(remarks) or 'no report'}")
    most = max(len(each) for each in scores)  # a column without resamples is the same in all
    shape = (most, len(models))
    sums: Values = np.sum([np.broadcast_to(_ranks(each), shape) for each in scores], axis=0)
    order = sorted(range(len(models)), key=lambda place: (sums[0, place], models[place].name))
    group_of = _groups(-sums, order)
    within = [_groups(each, list(np.argsort(-each[0], kind="stable"))) for each in scores]
    standings = []
    for place in order:
        own = models[place].entries
        metrics = [_metric(own[column].report) if column in own else None for column in columns]
        low, high = interval(sums[1:, place]) if most > 1 else (sums[0, place], sums[0, place])
        standings.append(
            Standing(
                model=models[place].name,
                rank_sum=float(sums[0, place]),
                low=float(low),
                high=float(high),
                group=group_of[place],
                metrics=tuple(metrics),
                groups=tuple(
                    groups[place] if metric is not None and len(each) > 1 else None
                    for groups, metric, each in zip(within, metrics, scores, strict=True)
                ),
            )
        )
    reports = [entry.report for entry in entries]
    return Leaderboard(
        columns=tuple(columns),
        titles=tuple(_title(column, columns, reports) for column in columns),
        standings=tuple(standings),
        notes=tuple(remarks),
    )


def leaderboard_table(board: Leaderboard) -> list[list[str]]:
    """Lay the ranking out as text: a head, and a row for each model."""
    rows = [["group", "model", "rank sum", *board.titles]]
    for each in board.standings:
        cells = [
            "-" if metric is None else f"{metric_text(metric)}{'' if group is None else f' [{group}]'}"
            for metric, group in zip(each.metrics, each.groups, strict=True)
        ]
        rows.append([str(each.group), each.model, _rank_text(each), *cells])
    return rows


def write_leaderboard(board: Leaderboard, path: Path) -> int:
    """Write the ranking as a page, atomically; return its size in bytes.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, extra="report")
    cells = [_cells(board, place) for place in range(len(board.columns))]
    heads = [(title, column.data) for title, column in zip(board.titles, board.columns, strict=True)]
    rows: list[Row] = [
        (each.group, each.model, Cell(text=_rank_text(each), order=each.rank_sum), *(c[row] for c in cells))
        for row, each in enumerate(board.standings)
    ]
    table = grid(
        "Sum of ranks over the tasks, less is better, with its 95 % interval. Models that lack a task share "
        "its last places. Models of one group cannot be resolved from its first: the interval of their "
        "difference over the same resampled images holds zero. ± is half of a 95 % interval.",
        ("group", "model", "rank sum", *heads),
        rows,
    )
    series = [
        Series(
            name="rank sum",
            color=0,
            x=(),
            y=tuple(each.rank_sum for each in board.standings),
            low=tuple(each.low for each in board.standings),
            high=tuple(each.high for each in board.standings),
        )
    ]
    svg = bars([each.model for each in board.standings], series, name="rank-sums", x_label="rank sum")
    plot = Plots(caption="Rank sums with 95 % intervals; shorter is better.", panels=(("", svg),))
    page = Page(
        title="leaderboard",
        subtitle=f"{len(board.standings)} models, {len(board.columns)} tasks",
        sections=(Section(anchor="ranking", title="ranking", elements=(table, *notes(board.notes), plot)),),
    )
    text = render(page)
    write_text(path, text)
    return len(text.encode())


def _cells(board: Leaderboard, place: int) -> list[Cell]:
    """Build the cells of a column, each with its group."""
    groups = [each.groups[place] for each in board.standings]
    cells = metric_cells([each.metrics[place] for each in board.standings])
    return [
        cell if group is None else replace(cell, small=f"group {group}")
        for cell, group in zip(cells, groups, strict=True)
    ]


def _rank_text(standing: Standing) -> str:
    return f"{standing.rank_sum:g} ({standing.low:g} to {standing.high:g})"


def _metric(report: Report) -> Metric:
    return report.metrics[report.primary_metric]


def _unfit(column: Column, models: Sequence[RankedModel]) -> str:
    """Explain why a column ranks nothing; empty if it does."""
    entries = [entry for each in models for entry in each.entries.items()]
    reports = [entry.report for own, entry in entries if own == column]
    metric = _metric(reports[0])
    if metric.unit.endswith("/s"):
        return "a speed depends on the machine"
    if metric.higher_is_better is None:
        return "neither more nor less of it is better"
    if len(reports) < 2:
        others = [
            entry.report for own, entry in entries if (own.task, own.data) == (column.task, column.data)
        ]
        return "; ".join(["only one model has it", *differences(others)])
    return ""


def _title(column: Column, columns: Sequence[Column], reports: Sequence[Report]) -> str:
    """Return a column's head; of several of one task on one data set, with the settings that differ."""
    alike = [each for each in columns if (each.task, each.data) == (column.task, column.data)]
    settings = [json.loads(each.protocol) for each in alike]
    own = settings[alike.index(column)]
    differ = [name for name in own if len({setting_text(each.get(name)) for each in settings}) > 1]
    ending = f" ({', '.join(f'{name} {setting_text(own[name])}' for name in differ)})" if differ else ""
    return f"{title_of(column.task, reports)}: {column.metric}{ending}"


def _scores(column: Column, models: Sequence[RankedModel]) -> tuple[Values, str]:
    """Return the models' scores [1 + R, M], and a note; [1, M] where the records cannot be paired.

    More is better; -inf where a model has none.
    """
    places = [place for place, each in enumerate(models) if column in each.entries]
    entries = [models[place].entries[column] for place in places]
    sign = 1.0 if _metric(entries[0].report).higher_is_better else -1.0
    resampled, note = resampled_metrics(entries), ""
    if resampled is None:
        resampled = np.empty((0, len(places)))
        note = f"{column.task} ({column.data}) has no records that can be paired: its order counts as certain"
    scores = np.full((1 + len(resampled), len(models)), -np.inf)
    scores[0, places] = [sign * _metric(entry.report).value for entry in entries]
    scores[1:, places] = sign * resampled
    return scores, note


def _ranks(scores: Values) -> Values:
    """Rank scores [..., M] from 1 for the highest; equal ones share the mean of their ranks.

    Where one is NaN, all ranks are.
    """
    better = (scores[..., None, :] > scores[..., :, None]).sum(axis=-1)
    equal = (scores[..., None, :] == scores[..., :, None]).sum(axis=-1)
    ranks: Values = 1 + better + (equal - 1) / 2
    ranks[np.isnan(scores).any(axis=-1)] = np.nan
    return ranks


def _groups(values: Values, order: Sequence[int]) -> dict[int, int]:
    """Divide models, the best first, into groups: each ends before the first that differs from its best.

    Args:
        values: [1 + R, M], more is better.
        order: the models' places, the best first.
    """
    groups: dict[int, int] = {}
    first, number = order[0], 1
    for place in order:
        if not _is_alike(values[:, first], values[:, place]):
            first, number = place, number + 1
        groups[place] = number
    return groups


def _is_alike(better: NDArray[np.float64], worse: NDArray[np.float64]) -> bool:
    """Check whether the 95 % interval of a difference [1 + R] holds zero; without resamples, if it is 0."""
    if len(better) == 1 or np.isinf(better[0]) or np.isinf(worse[0]):
        return bool(better[0] == worse[0])
    low, _ = interval(better[1:] - worse[1:])
    return low <= 0

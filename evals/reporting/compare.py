"""Comparison of two folders of reports: what changed, how certain that is, and whether it is a regression."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from evals.core.report import Metric, Number, Report, read
from evals.core.stats import Values, area_ratios, interval, mean_present, resampled_sums
from radio.errors import DataError, shown
from radio.io import parse_json, read_text

from .elements import file_inside

# Letters: N samples, U units, R resamples, P parts, C classes.

_ALWAYS_FREE = frozenset({"resolved"})  # follows from the machine where the settings do not say more
_MAX_LINE = 16 << 20  # bytes of a record
_MAX_CLASSES = 10_000  # areas of each class are held for each unit

Verdict = Literal["better", "worse", "same", "changed", "missing", "new", "timing"]


class StoredReport(NamedTuple):
    """A report and the path of its file."""

    report: Report
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The change of one metric of one task."""

    task: str
    model: str
    metric: str
    unit: str
    value: float | None
    baseline: float | None
    low: float | None = None  # 95 % interval of the difference
    high: float | None = None
    paired: bool = False  # the interval is a paired bootstrap
    allowed: float = 0.0  # the larger of tolerance and noise
    verdict: Verdict

    @property
    def difference(self) -> float | None:
        """New value minus baseline; None where either is missing."""
        if self.value is None or self.baseline is None:
            return None
        return self.value - self.baseline


def read_reports(folder: Path) -> dict[tuple[str, str], StoredReport]:
    """Read the reports of a folder by task and model.

    Raises:
        DataError: no such folder, no report in it, a damaged one, or two of one task and model.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of reports")
    entries: dict[tuple[str, str], StoredReport] = {}
    for path in sorted(folder.glob("*.json")):
        if not is_report(path):
            continue
        report = read(path)
        first = entries.setdefault((report.task, report.model), StoredReport(report, path))
        if first.path != path:
            raise DataError(
                f"{shown(folder)}: {shown(first.path.name)} and {shown(path.name)} are both of "
                f"{shown(report.task)} and {shown(report.model)}; keep one of them"
            )
    if not entries:
        raise DataError(f"{folder}: holds no reports; radio-eval TASK MODEL --out {folder} writes them")
    return entries


def compare(
    reports: Mapping[tuple[str, str], StoredReport],
    baseline: Mapping[tuple[str, str], StoredReport],
    *,
    tolerance: float,
    noise: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Change]:
    """Compare every metric of every task, in the order of the baseline.

    Reports are paired by task and model; where each side has one report of a task, by the task alone. A drop
    is a regression when it is larger than the tolerance and larger than the noise. Rates are shown and not
    judged. A task of the baseline without a new report is `missing`, and so is a metric of the baseline that
    the new report has not; both are regressions too.

    Args:
        tolerance: in the metric's unit.
        noise: by task and metric, how much two runs of one model differ.

    Raises:
        DataError: two reports differ in settings or data; the message names the difference.
    """
    changes: list[Change] = []
    for new, old in _pair(reports, baseline):
        if new is None or old is None:
            present = new or old
            assert present is not None, "a pair has two sides, or one"
            verdict: Verdict = "missing" if new is None else "new"
            changes.append(_one_sided(present.report, present.report.primary_metric, verdict))
            continue
        _check_alike(new, old)
        known = (noise or {}).get(old.report.task, {})
        changes.extend(_changes(new, old, tolerance, known))
    return changes


def regressions(changes: Sequence[Change]) -> list[Change]:
    """Select the changes that fail a gate: `worse` and `missing`."""
    return [change for change in changes if change.verdict in ("worse", "missing")]


def is_report(path: Path) -> bool:
    """Check whether a JSON file is a report, or is damaged and may have been one."""
    try:
        data = parse_json(read_text(path), path)
    except DataError:
        return True  # `read` reports what is wrong with it
    return not isinstance(data, dict) or str(data.get("format", "am-radio-report")).startswith(
        "am-radio-report"
    )


def _pair(
    reports: Mapping[tuple[str, str], StoredReport], baseline: Mapping[tuple[str, str], StoredReport]
) -> list[tuple[StoredReport | None, StoredReport | None]]:
    pairs: list[tuple[StoredReport | None, StoredReport | None]] = []
    for task in dict.fromkeys(task for task, _ in (*baseline, *reports)):
        new, old = (
            {model: entry for (other, model), entry in entries.items() if other == task}
            for entries in (reports, baseline)
        )
        if len(new) == len(old) == 1:
            pairs.append((next(iter(new.values())), next(iter(old.values()))))
            continue
        pairs.extend((new.get(model), old.get(model)) for model in dict.fromkeys([*old, *new]))
    return pairs


def _one_sided(report: Report, name: str, verdict: Verdict) -> Change:
    metric = report.metrics[name]
    value, baseline = (metric.value, None) if verdict == "new" else (None, metric.value)
    return Change(
        task=report.task,
        model=report.model,
        metric=name,
        unit=metric.unit,
        value=value,
        baseline=baseline,
        verdict=verdict,
    )


def _check_alike(new: StoredReport, old: StoredReport) -> None:
    """Refuse to compare reports that differ in settings or data."""
    ours, theirs = protocols([new.report, old.report])
    for name in dict.fromkeys([*theirs, *ours]):
        if ours.get(name) != theirs.get(name):
            raise DataError(
                f"{new.path} and {old.path} cannot be compared: {name} is {_short(ours.get(name))} in the "
                f"one and {_short(theirs.get(name))} in the other; make both alike"
            )


def protocols(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return what must be equal for reports of one task to be comparable: data, and settings.

    Settings of the machine, as any of the reports declares them, may differ. Those that any declares as
    compared have their resolved values.
    """
    free = _ALWAYS_FREE.union(*(report.machine_settings for report in reports))
    compared = {name for report in reports for name in report.compared_settings}
    every = []
    for report in reports:
        protocol = {name: value for name, value in report.settings.items() if name not in free}
        if isinstance(resolved := report.settings.get("resolved"), Mapping):
            protocol |= {name: value for name, value in resolved.items() if name in compared}
        for role in dict.fromkeys(used.role for used in report.data):
            sets = [used for used in report.data if used.role == role]
            protocol[f"{role} data"] = "; ".join(f"{d.name} ({d.count}, {d.fingerprint[:12]})" for d in sets)
        every.append(protocol)
    return every


def differences(reports: Sequence[Report]) -> list[str]:
    """List what makes the reports of one task incomparable: settings and data that differ."""
    remarks, every = [], protocols(reports)
    for name in dict.fromkeys(name for protocol in every for name in protocol):
        values = dict.fromkeys(setting_text(protocol.get(name)) for protocol in every)
        if len(values) > 1:
            remarks.append(f"not made alike: {name} is {' or '.join(values)}")
    return remarks


def setting_text(value: Any) -> str:
    """Format a setting's value for a reader."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _changes(
    new: StoredReport, old: StoredReport, tolerance: float, noise: Mapping[str, float]
) -> list[Change]:
    changes = []
    for name, before in old.report.metrics.items():
        after = new.report.metrics.get(name)
        if after is None:
            changes.append(replace(_one_sided(old.report, name, "missing"), model=new.report.model))
            continue
        low, high = _unpaired(after, before)
        paired = None
        if name == old.report.primary_metric:
            paired = paired_interval(new, old)
            low, high = paired or (low, high)
        allowed = max(tolerance, noise.get(name, 0.0))
        changes.append(
            Change(
                task=new.report.task,
                model=new.report.model,
                metric=name,
                unit=before.unit,
                value=after.value,
                baseline=before.value,
                low=low,
                high=high,
                paired=paired is not None,
                allowed=allowed,
                verdict=_judge(after, before, allowed),
            )
        )
    return changes


def _judge(after: Metric, before: Metric, allowed: float) -> Verdict:
    if before.unit.endswith("/s"):
        return "timing"
    if before.higher_is_better is None:
        return "same" if after.value == before.value else "changed"
    gain = after.value - before.value if before.higher_is_better else before.value - after.value
    if gain < -allowed:
        return "worse"
    return "better" if gain > allowed else "same"


def _unpaired(after: Metric, before: Metric) -> tuple[float | None, float | None]:
    """Compute the difference's interval from both metrics' intervals, as if they were independent."""
    halves = [
        (metric.high - metric.low) / 2
        for metric in (after, before)
        if metric.low is not None and metric.high is not None
    ]
    if len(halves) < 2:
        return None, None
    half, difference = math.hypot(*halves), after.value - before.value
    return difference - half, difference + half


class _Record(TypedDict):
    """The part of a record that pairing reads."""

    id: str | int
    part: NotRequired[str]
    unit: NotRequired[str | int | None]
    score: NotRequired[FiniteFloat]
    areas: NotRequired[list[Annotated[list[Number], Field(min_length=4, max_length=4)]]]


_RECORD = TypeAdapter(_Record)
_KEY = tuple[str, str]  # part, id


@dataclass(frozen=True, slots=True)
class _Samples:
    """The samples of the baseline, in its order: where each stands, its unit and its part."""

    places: dict[_KEY, int] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)


def paired_interval(new: StoredReport, old: StoredReport) -> tuple[float, float] | None:
    """Compute the 95 % interval of the difference of two primary metrics, in percent.

    It is a paired bootstrap over shared units, such as images. None where a report has no records, or where
    they are not of the same samples or do not give the reports' own values (a primary metric that is a mean
    over heads, or a rank).
    """
    resampled = resampled_metrics((old, new))
    return None if resampled is None else interval(resampled[:, 1] - resampled[:, 0])


def resampled_metrics(entries: Sequence[StoredReport]) -> Values | None:
    """Compute the primary metrics of several reports on the same resamples of their units: [R, reports].

    They are in percent, and NaN for all reports where a resample gives one of them no value (void images
    alone). None as in `paired_interval`.
    """
    pairing, samples, values = entries[0].report.pairing, _Samples(), []
    for entry in entries:
        of_entry = _read_values(entry, samples) if entry.report.pairing == pairing else None
        if of_entry is None:
            return None
        values.append(of_entry)
    units, unit_of = _numbered(samples.units)
    parts, part_of = _numbered(samples.parts)
    by_area, num_columns = pairing == "mean_iou", len(parts)
    if by_area:
        num_columns = 1 + max(int(v[:, 0].max(initial=0)) for _, v in values)
    sums = []
    for entry, (rows, each) in zip(entries, values, strict=True):
        column = each[:, 0].astype(np.int64) if by_area else part_of[rows]
        sums.append(_sum_cells(each, unit_of[rows], column, len(units), num_columns, by_area=by_area))
        if not _gives_value(entry.report, sums[-1]):
            return None
    resampled = resampled_sums(np.stack(sums, axis=1))
    metrics = np.stack([METRIC_OF[pairing](resampled[:, place]) for place in range(len(entries))], axis=1)
    metrics[np.isnan(metrics).any(axis=1)] = np.nan
    return None if np.isnan(metrics).all() else metrics


def block_sums(entry: StoredReport, num_blocks: int) -> Values | None:
    """Sum a report's records over blocks of units, from which resamples of its primary metric follow.

    The units, sorted by name, are dealt to the blocks in turn, so that reports on the same samples have the
    same blocks.

    Args:
        entry: the report.
        num_blocks: B; fewer where there are fewer units.

    Returns:
        [B, 2, P], scores and counts of each part, or [B, 3, C], areas of each class: what `METRIC_OF` takes
        after summing over blocks. None as in `paired_interval`.
    """
    samples = _Samples()
    if (read_values := _read_values(entry, samples)) is None:
        return None
    rows, values = read_values
    units, unit_of = _numbered(samples.units)
    parts, part_of = _numbered(samples.parts)
    by_area, num_blocks = entry.report.pairing == "mean_iou", min(num_blocks, len(units))
    column = values[:, 0].astype(np.int64) if by_area else part_of[rows]
    num_columns = 1 + int(column.max(initial=0)) if by_area else len(parts)
    sums = _sum_cells(values, unit_of[rows] % num_blocks, column, num_blocks, num_columns, by_area=by_area)
    return sums if _gives_value(entry.report, sums) else None


def _sum_cells(
    values: Values,
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    num_rows: int,
    num_columns: int,
    *,
    by_area: bool,
) -> Values:
    """Sum the values of `_read_values` by row and column: [rows, amounts, columns]."""
    amounts = values[:, 1:].T if by_area else np.stack([values[:, 0], np.ones(len(values))])
    cell, size = row * num_columns + column, num_rows * num_columns
    counted = [np.bincount(cell, weights=of, minlength=size) for of in amounts]
    return np.stack([c.reshape(-1, num_columns) for c in counted], axis=1)


def _gives_value(report: Report, sums: Values) -> bool:
    """Check that the records give the report's own value."""
    reported = report.metrics[report.primary_metric].value
    return bool(abs(METRIC_OF[report.pairing](sums.sum(axis=0)[None])[0] - reported) <= 0.01)


def _numbered(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct names in order, and the number of each name."""
    distinct = sorted(set(names))
    numbers = {name: number for number, name in enumerate(distinct)}
    return distinct, np.fromiter((numbers[name] for name in names), np.int64, len(names))


def _mean_of_parts(sums: Values) -> Values:
    """Average the mean scores of the parts that occur, in percent: scores and counts [R, 2, P] -> [R]."""
    with np.errstate(invalid="ignore"):
        return 100 * mean_present(sums[:, 0] / sums[:, 1])


def _mean_iou(areas: Values) -> Values:
    """Compute the mIoU in percent over the classes that occur: [R, 3, C] -> [R]."""
    return mean_present(area_ratios(areas)[0])


METRIC_OF: Mapping[str, Callable[[Values], Values]] = {"mean": _mean_of_parts, "mean_iou": _mean_iou}
"""For each pairing, the primary metric [R] of sums [R, amounts, P or C]."""


def _read_values(entry: StoredReport, samples: _Samples) -> tuple[NDArray[np.int64], Values] | None:
    """Read a report's records, line by line: the place of each value's sample, and the values.

    Values are scores [rows, 1], or areas [rows, 4]: class, intersection, prediction and label in pixels. None
    where the report names no records, or where one cannot be read or stands twice, or where they are not
    those of `samples`, which the first report fills.
    """
    report = entry.report
    path = file_inside(entry.path.parent.resolve(), report.records) if report.records else None
    num_classes = max((used.num_classes for used in report.data), default=0)
    if path is None or num_classes > _MAX_CLASSES:
        return None
    first, by_area = not samples.places, report.pairing == "mean_iou"
    places, lengths, values = array("q"), array("q"), array("d")
    try:
        for line in _lines(path):
            record = _RECORD.validate_json(line, strict=True)
            id, part = str(record["id"]), record.get("part", "")
            if first:
                samples.places[part, id] = len(places)
                samples.units.append(id if record.get("unit") is None else str(record["unit"]))
                samples.parts.append(part)
            rows = record["areas"] if by_area else [[record["score"]]]
            if by_area and any(area[0] >= num_classes for area in rows):
                return None
            places.append(samples.places[part, id])
            lengths.append(len(rows))
            for row in rows:
                values.extend(row)
    except (ValidationError, KeyError):  # damaged, without what the pairing needs, or of another sample
        return None
    if not places or len(places) != len(samples.places) or len(np.unique(places)) < len(places):
        return None
    width = 4 if by_area else 1
    return np.repeat(np.asarray(places), np.asarray(lengths)), np.asarray(values).reshape(-1, width)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; a line that is longer than any record comes in parts."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            yield line

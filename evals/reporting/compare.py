"""Comparison of two folders of reports: what changed, how certain that is, and whether it is a regression."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evals.core.report import Metric, Report, read
from radio.errors import DataError, shown
from radio.io import parse_json, read_text

from .pairing import paired_interval
from .records import Entry
from .sections import machine_settings

Verdict = Literal["better", "worse", "same", "missing", "new", "timing"]


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


def read_reports(folder: Path) -> dict[tuple[str, str], Entry]:
    """Read the reports of a folder by task and model.

    Raises:
        DataError: no such folder, no report in it, a damaged one, or two of one task and model.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of reports")
    found: dict[tuple[str, str], Entry] = {}
    for path in sorted(folder.glob("*.json")):
        if not is_report(path):
            continue
        report = read(path)
        first = found.setdefault((report.task, report.model), Entry(report, path))
        if first.path != path:
            raise DataError(
                f"{shown(folder)}: {shown(first.path.name)} and {shown(path.name)} are both of "
                f"{shown(report.task)} and {shown(report.model)}; keep one of them"
            )
    if not found:
        raise DataError(f"{folder}: holds no reports; radio-eval TASK MODEL --out {folder} writes them")
    return found


def compare(
    reports: Mapping[tuple[str, str], Entry],
    baseline: Mapping[tuple[str, str], Entry],
    *,
    tolerance: float,
    noise: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Change]:
    """Compare every metric of every task, in the order of the baseline.

    Reports are paired by task and model; where each side has one report of a task, by the task alone. A drop
    is a regression when it is larger than the tolerance and larger than the noise. Rates are shown and not
    judged. A task of the baseline without a new report is `missing`, which is a regression too.

    Args:
        tolerance: in the metric's unit.
        noise: by task and metric, how much two runs of one model differ.

    Raises:
        DataError: two reports differ in settings or data; the message names the difference.
    """
    pairs = _pair(reports, baseline)
    changes: list[Change] = []
    for new, old in pairs:
        if new is None or old is None:
            present = new or old
            assert present is not None, "a pair has two sides, or one"
            changes.append(_one_sided(present.report, "missing" if new is None else "new"))
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
    reports: Mapping[tuple[str, str], Entry], baseline: Mapping[tuple[str, str], Entry]
) -> list[tuple[Entry | None, Entry | None]]:
    new_by_task, old_by_task = _by_task(reports), _by_task(baseline)
    pairs: list[tuple[Entry | None, Entry | None]] = []
    for task in dict.fromkeys([*old_by_task, *new_by_task]):
        new, old = new_by_task.get(task, {}), old_by_task.get(task, {})
        if len(new) == len(old) == 1:
            pairs.append((next(iter(new.values())), next(iter(old.values()))))
            continue
        pairs.extend((new.get(model), old.get(model)) for model in dict.fromkeys([*old, *new]))
    return pairs


def _by_task(entries: Mapping[tuple[str, str], Entry]) -> dict[str, dict[str, Entry]]:
    found: dict[str, dict[str, Entry]] = {}
    for (task, model), entry in entries.items():
        found.setdefault(task, {})[model] = entry
    return found


def _one_sided(report: Report, verdict: Verdict) -> Change:
    metric = report.metrics[report.primary_metric]
    value, baseline = (metric.value, None) if verdict == "new" else (None, metric.value)
    return Change(
        task=report.task,
        model=report.model,
        metric=report.primary_metric,
        unit=metric.unit,
        value=value,
        baseline=baseline,
        verdict=verdict,
    )


def _check_alike(new: Entry, old: Entry) -> None:
    """Refuse to compare reports that differ in settings or data."""
    free = machine_settings([new.report, old.report])
    ours, theirs = (protocol(entry.report, free) for entry in (new, old))
    for name in dict.fromkeys([*theirs, *ours]):
        if ours.get(name) != theirs.get(name):
            raise DataError(
                f"{new.path} and {old.path} cannot be compared: {name} is {_short(ours.get(name))} in the "
                f"one and {_short(theirs.get(name))} in the other; make both alike"
            )


def protocol(report: Report, free: frozenset[str]) -> dict[str, Any]:
    """Return what must be equal for reports to be comparable: settings (except the `free` ones) and data."""
    settings = {key: value for key, value in report.settings.items() if key not in free}
    data = {
        f"{used.role} data": f"{used.name} ({used.count}, {used.fingerprint[:12]})" for used in report.data
    }
    return settings | data


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _changes(new: Entry, old: Entry, tolerance: float, noise: Mapping[str, float]) -> list[Change]:
    found = []
    for name, before in old.report.metrics.items():
        after = new.report.metrics.get(name)
        if after is None:
            continue
        low, high = _unpaired(after, before)
        paired = None
        if name == old.report.primary_metric:
            paired = paired_interval(new, old)
            low, high = paired or (low, high)
        allowed = max(tolerance, noise.get(name, 0.0))
        found.append(
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
    return found


def _judge(after: Metric, before: Metric, allowed: float) -> Verdict:
    if before.unit.endswith("/s"):
        return "timing"
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

"""The report of an evaluation: one versioned JSON, validated by its types, hashed, written atomically.

`docs/report.schema.json` is the schema of the file, derived from `Report`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from radio.config import to_plain
from radio.errors import ConfigError, DataError, shown
from radio.io import explain, parse_json, read_text, without_surrogates, write_text

from .blocks import Block

FORMAT = "am-radio-report/3"
_MAX_BYTES = 256 << 20  # a report that lists a million images which could not be read

Number = Annotated[int, Field(ge=0, le=2**53)]
Value = Annotated[float, Field(ge=-1e100, le=1e100)]  # the range that figures can show

Kind = Literal["student", "teacher", "untrained"]
Pairing = Literal["mean", "mean_iou"]
"""How the primary metric follows from the records: the mean of `score` (over the parts, where there are
several), or the mean over the classes of intersection over union, from `areas`."""

Record = Mapping[str, Any]
"""One sample of a report. Its `id` is unique in its `part` (default: one part). Two models' reports are
paired by `score` (0 to 1; from 0 on where less is better) or `areas` (a list of [class, intersection,
prediction, label] in pixels), and resampled by `unit` (default: the id), such as the image of several
questions. All else is the evaluator's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number, with its 95 % confidence interval or its spread where there is one."""

    value: Value
    low: Value | None = None
    high: Value | None = None
    std: Value | None = None  # over repetitions (few-shot tries)
    higher_is_better: bool | None = True  # None: neither is
    unit: str = "%"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An image that could not be read, and why."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """One data set, as it was used."""

    role: str  # "bank", "query"
    name: str
    fingerprint: str
    count: Number  # images used; skipped ones are not counted
    num_classes: Number
    skipped: tuple[Skipped, ...] = ()
    scored: bool = True  # False for data that the evaluator learns from, such as a bank


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that is needed to believe a score, and to repeat it."""

    task: str
    model: str
    fingerprint: str  # of architecture and weights
    primary_metric: str  # the metric that a table shows first
    metrics: Annotated[dict[str, Metric], Field(min_length=1)]
    settings: dict[str, Any]  # as given; `resolved` holds the resolved values
    data: tuple[DatasetInfo, ...]
    device: str
    seconds: dict[str, Annotated[float, Field(ge=0)]]
    created: str  # UTC, ISO 8601
    versions: dict[str, str]
    git: str | None = None
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # written beside the report
    records: str = ""  # the file among them with a JSON line per sample; see `Record`
    pairing: Pairing = "mean"
    title: str = ""  # the task's name for people
    kind: Kind = "student"
    baselines: dict[str, Value] = field(default_factory=dict)  # the primary metric without the model
    blocks: tuple[Block, ...] = ()  # what the page shows
    # The checkpoint's metadata: teachers, data, settings, provenance.
    metadata: dict[str, Any] = field(default_factory=dict)
    machine_settings: tuple[str, ...] = ()  # names of settings that may differ where reports are compared
    compared_settings: tuple[str, ...] = ()  # names of settings whose resolved values must be equal there
    peak_memory: float | None = None  # MiB, of the process or of the GPU
    format: Literal["am-radio-report/3"] = "am-radio-report/3"

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title=FORMAT)


_SCHEMA = TypeAdapter(Report)


def schema() -> dict[str, Any]:
    """Derive the JSON schema of a report's file."""
    derived: dict[str, Any] = _SCHEMA.json_schema()
    sha256 = {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "Of all else, with sorted keys."}
    derived["properties"]["sha256"] = sha256
    derived["required"].append("sha256")
    return derived


def write(report: Report, path: Path) -> None:
    """Write a report as JSON, atomically, with a sha256 of its content; raises as `to_json`."""
    write_text(path, to_json(report))


def to_json(report: Report) -> str:
    """Return the content of a report's file.

    Raises:
        DataError: a metric that is not finite, a primary metric that is missing, or values that the schema
            does not allow.
    """
    metrics: Mapping[str, object] = report.metrics
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise DataError(f"metrics[{name!r}] is a {type(metric).__name__}, wanted a Metric")
        if not math.isfinite(metric.value):
            raise DataError(f"the value of {name} is {metric.value}; nothing is written")
    if report.primary_metric not in metrics:
        raise DataError(
            f"the primary metric {report.primary_metric!r} is not among the metrics: {', '.join(metrics)}"
        )
    try:
        data = without_surrogates(to_plain(report))  # of names that are not UTF-8
        _parse(data)
    except (TypeError, AttributeError) as error:  # values that are no plain data
        raise DataError(str(error)) from error
    return json.dumps({**data, "sha256": _digest(data)}, indent=2, ensure_ascii=False) + "\n"


def read(path: Path) -> Report:
    """Read the report in a file.

    Raises:
        DataError: no such file, not a report of this format, or an altered one.
    """
    if not path.exists():
        raise DataError(f"{shown(path)}: no such report")
    data = parse_json(read_text(path, limit=_MAX_BYTES), path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{shown(path)}: not a report of the format {FORMAT}")
    sha256 = data.pop("sha256", None)
    try:
        report = _parse(data)
    except DataError as error:
        raise DataError(f"{shown(path)}: not a report of the format {FORMAT}: {error}") from error
    if sha256 != _digest(data):
        raise DataError(
            f"{shown(path)}: its content does not match its sha256; it was altered, make it again"
        )
    if report.primary_metric not in report.metrics:
        raise DataError(
            f"{shown(path)}: its primary metric {report.primary_metric!r} is not among its metrics"
        )
    return report


def record_lines(records: Iterable[Record], *, errors: bool = False) -> Iterator[str]:
    """Yield records as JSON lines.

    Args:
        errors: whether the scores are errors, which may be above 1.

    Raises:
        ConfigError: a record without an id, two of one id and part, a score outside its range, or no JSON.
    """
    highest, wanted = (math.inf, "of 0 or more") if errors else (1, "from 0 to 1")
    ids: dict[str, set[str]] = {}  # of each part
    for index, record in enumerate(records):
        seen, id = ids.setdefault(str(record.get("part", "")), set()), str(record.get("id", ""))
        score = record.get("score", 0)
        if "id" not in record or id in seen:
            raise ConfigError(f"record {index} has {'the id of another' if id in seen else 'no id'}: {id!r}")
        if not isinstance(score, (int, float)) or not 0 <= score <= highest:
            raise ConfigError(f"record {index} ({id}) has the score {score!r}; wanted a number {wanted}")
        seen.add(id)
        try:
            yield json.dumps(record, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"record {index} ({id}) is no JSON: {error}") from error


def metric_text(metric: Metric | None) -> str:
    """Format a value with half of its interval, or its standard deviation in brackets; empty for None."""
    if metric is None:
        return ""
    if metric.low is not None and metric.high is not None:
        return f"{metric.value:.1f} ±{(metric.high - metric.low) / 2:.1f}"
    return f"{metric.value:.1f} ({metric.std:.1f})" if metric.std is not None else f"{metric.value:.1f}"


def file_name(task: str, model: str) -> str:
    """Return the name of a report's file without its extension, such as `knn-pip-efficientnet-lite0`."""
    return f"{task}-{re.sub(r'[^A-Za-z0-9._]+', '-', model).strip('-.') or 'model'}"


def _digest(data: Mapping[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parse(data: Mapping[str, Any]) -> Report:
    try:
        return _SCHEMA.validate_json(json.dumps(data))
    except ValidationError as error:
        problem = explain(error)
    except ValueError as error:  # a number that JSON does not have, a key that is no text
        problem = str(error)
    raise DataError(problem)

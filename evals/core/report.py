"""What an evaluation leaves behind: one versioned JSON, checked against a schema, hashed, written whole."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jsonschema

from radio.config import from_plain, to_plain
from radio.errors import ConfigError, DataError
from radio.io import write_text

FORMAT = "am-radio-report/2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number, with its 95 % confidence interval or its spread where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    std: float | None = None  # over repetitions (few-shot tries)
    higher_is_better: bool = True
    unit: str = "%"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A picture that could not be read, and why."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataUsed:
    """One data set, as it was used."""

    role: str  # "bank", "query"
    name: str
    fingerprint: str
    count: int  # pictures used; skipped ones are not counted
    num_classes: int
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows under named columns, such as the accuracy of each class."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that is needed to believe a score, and to repeat it."""

    task: str
    model: str
    fingerprint: str  # of architecture and weights
    headline: str  # the metric that a table shows first
    metrics: dict[str, Metric]
    settings: dict[str, Any]
    data: tuple[DataUsed, ...]
    device: str
    seconds: dict[str, float]
    created: str  # UTC, ISO 8601
    versions: dict[str, str]
    git: str | None = None
    notes: tuple[str, ...] = ()
    tables: dict[str, Table] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # written beside the report
    card: dict[str, Any] = field(
        default_factory=dict
    )  # the checkpoint's: teachers, data, settings, provenance
    peak_memory: float | None = None  # MiB, of the process or of the GPU
    format: str = FORMAT


_NUMBER = {"type": "number"}
_OPTIONAL_NUMBER = {"type": ["number", "null"]}
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_CELL = {"type": ["string", "number", "null"]}


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object schema with exactly these properties."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": dict(values)}


_METRIC = _closed(
    {
        "value": _NUMBER,
        "low": _OPTIONAL_NUMBER,
        "high": _OPTIONAL_NUMBER,
        "std": _OPTIONAL_NUMBER,
        "higher_is_better": {"type": "boolean"},
        "unit": _TEXT,
    }
)
_DATA_USED = _closed(
    {
        "role": _TEXT,
        "name": _TEXT,
        "fingerprint": _TEXT,
        "count": {"type": "integer", "minimum": 0},
        "num_classes": {"type": "integer", "minimum": 0},
        "skipped": {"type": "array", "items": _closed({"key": _TEXT, "reason": _TEXT})},
    }
)
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": FORMAT,
    **_closed(
        {
            "format": {"const": FORMAT},
            "task": _TEXT,
            "model": {**_TEXT, "description": "What the report calls it."},
            "fingerprint": {**_TEXT, "description": "sha256 of the weights and the architecture."},
            "headline": {**_TEXT, "description": "The metric that a table shows first."},
            "metrics": {**_mapping(_METRIC), "minProperties": 1},
            "settings": {"type": "object", "description": "As given; `resolved` is what they came to."},
            "data": {"type": "array", "items": _DATA_USED},
            "device": _TEXT,
            "seconds": _mapping({"type": "number", "minimum": 0}),
            "created": _TEXT,
            "versions": _mapping(_TEXT),
            "git": {"type": ["string", "null"]},
            "notes": _TEXTS,
            "tables": _mapping(
                _closed(
                    {
                        "columns": _TEXTS,
                        "rows": {"type": "array", "items": {"type": "array", "items": _CELL}},
                    }
                )
            ),
            "files": {**_TEXTS, "description": "Records and pictures, written beside the report."},
            "card": {"type": "object", "description": "The checkpoint's card; empty for other models."},
            "peak_memory": {**_OPTIONAL_NUMBER, "description": "MiB, of the process or of the GPU."},
            "sha256": {
                "type": "string",
                "pattern": "^[0-9a-f]{64}$",
                "description": "Of everything else, as JSON with sorted keys.",
            },
        }
    ),
}
_VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def write(report: Report, path: Path) -> None:
    """Write a report as JSON, atomically, with a sha256 of its content.

    Raises:
        DataError: a metric that is not a finite number, a headline that is no metric, or values that the
            schema does not know.
    """
    for name, metric in report.metrics.items():
        if not math.isfinite(metric.value):
            raise DataError(f"metric {name} is {metric.value}; nothing is written")
    if report.headline not in report.metrics:
        raise DataError(
            f"the headline {report.headline!r} is not among the metrics: {', '.join(report.metrics)}"
        )
    data = to_plain(report)
    whole = {**data, "sha256": _digest(data)}
    _check(whole, path)
    write_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def read(path: Path) -> Report:
    """The report in a file.

    Raises:
        DataError: no such file, not a report of this format, or one that was altered.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such report")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a report, or a part of one ({error})") from error
    _check(data, path)
    if data.pop("sha256") != _digest(data):
        raise DataError(f"{path}: its content does not match its sha256; it was altered, make it again")
    return _build(data, path)


def _check(data: Any, path: Path) -> None:
    wrong = next(iter(_VALIDATOR.iter_errors(data)), None)
    if wrong is not None:
        where = "/".join(map(str, wrong.absolute_path)) or "the file"
        raise DataError(f"{path}: not a report of the format {FORMAT}: {where}: {wrong.message[:200]}")


def file_name(task: str, model: str) -> str:
    """The name of a report's file, without its ending: `knn-pip-efficientnet-lite0`."""
    return f"{task}-{re.sub(r'[^A-Za-z0-9._]+', '-', model).strip('-.') or 'model'}"


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson 1927): 95 % unless `z` says otherwise.

    Unlike the normal approximation it stays inside [0, 1] and holds for small counts and for 0 and 100 %.

    Raises:
        DataError: no trials.
    """
    if count < 1 or not 0 <= successes <= count:
        raise DataError(
            f"{successes} successes in {count} trials have no interval; at least one trial is needed"
        )
    share = successes / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def proportion(successes: float, count: int) -> Metric:
    """A percentage with Wilson's interval.

    Raises:
        DataError: no trials.
    """
    low, high = wilson(successes, count)
    return Metric(value=100 * successes / count, low=100 * low, high=100 * high)


def _digest(data: Mapping[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _build(data: dict[str, Any], path: Path) -> Report:
    values = {f.name: data[f.name] for f in fields(Report)}
    try:
        values["metrics"] = {name: from_plain(Metric, metric) for name, metric in data["metrics"].items()}
        values["data"] = tuple(from_plain(DataUsed, used) for used in data["data"])
        values["tables"] = {name: from_plain(Table, table) for name, table in data["tables"].items()}
    except ConfigError as error:
        raise DataError(f"{path}: not a report of the format {FORMAT}: {error}") from error
    for name in ("notes", "files"):
        values[name] = tuple(data[name])
    return Report(**values)

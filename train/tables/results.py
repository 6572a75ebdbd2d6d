"""The results of a table's rows as small files, from which tables are collected without any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from evals.core.report import Value
from radio.config import difference, to_plain
from radio.errors import DataError, RadioError, shown
from radio.io import read_json, write_text

from ..config import TrainConfig
from ..loggers import LOG, read_records

FILE = "tables.json"
"""Name of the file of collected tables, in the folder of results."""
FORMAT: Literal["am-radio-row/1"] = "am-radio-row/1"
NUM_BLOCKS = 30  # of images, which the intervals of differences resample
_LAST = 0.1  # share of a run's records whose mean is its loss

# Letters: B blocks, A amounts, P parts, C classes.

_FREE = frozenset(
    (
        *("recipe", "out", "device", "precision", "peak_tflops", "compile", "prefetch_teachers", "loggers"),
        *("log_every", "save_every", "keep_last", "keep_every", "eval_every", "eval_tasks", "score", "tasks"),
        *("teacher_placement", "ranks_per_group", "parallel", "grad_accum_steps", "max_nonfinite_steps"),
        *("data_root", "cache"),
    )
)
"""Settings that change what a run costs, prints or is scored on, but not which student it trains; of the
cache's settings only those of its fixed crops do that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The value of one metric, and what intervals need."""

    value: Value
    low: Value | None = None  # 95 % interval over images
    high: Value | None = None
    pairing: Literal["", "mean", "mean_iou"] = ""  # how the value follows from the blocks; empty: no blocks
    blocks: tuple[tuple[tuple[Value, ...], ...], ...] = ()  # [B, A, P or C], as `block_sums` gives them


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """What one run, or one teacher, contributes to the tables."""

    name: str
    settings: dict[str, Any]  # of the run, as far as they decide the student; a teacher's `model`
    student: str = ""  # empty for a teacher
    values: dict[str, Value] = field(default_factory=dict)  # of `OF_THE_RUN`, but for the speed
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)  # by evaluation, then metric
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings of each evaluation
    data: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what each evaluation scored on
    left_out: dict[str, str] = field(default_factory=dict)  # evaluations that it cannot have, and why
    seconds: dict[str, float] = field(default_factory=dict)  # of training and scoring
    device: str = ""
    created: str = ""
    format: Literal["am-radio-row/1"] = FORMAT

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


_FILE = TypeAdapter(RowResult)


def deciding_settings(config: TrainConfig) -> dict[str, Any]:
    """Return a run's settings as far as they decide its student, as plain data."""
    plain: dict[str, Any] = {name: value for name, value in to_plain(config).items() if name not in _FREE}
    plain["data"] = {name: value for name, value in plain["data"].items() if name != "workers"}
    if config.cache.folder is not None:
        plain["fixed_crops"] = [config.cache.images, config.cache.crops]
    return plain


def read_result(folder: Path, name: str) -> RowResult | None:
    """Read the result of a row; None where there is none.

    Raises:
        DataError: the file is damaged.
    """
    path = result_path(folder, name)
    if not path.is_file():
        return None
    try:
        return read_json(path, _FILE, strict=False)
    except RadioError as error:
        raise DataError(
            f"{shown(path)}: is no result of a row ({error}); delete it to make it again"
        ) from None


def write_result(folder: Path, result: RowResult) -> None:
    """Write the result of a row atomically, one metric in a line."""
    text = json.dumps(to_plain(result), indent=1)
    write_text(result_path(folder, result.name), _compact(text) + "\n")


def result_path(folder: Path, name: str) -> Path:
    """Return the file of a row's result."""
    return folder / f"{name.replace(':', '-')}.json"


def _compact(text: str) -> str:
    """Join the lines of nested lists, which would be a line per number."""
    lines: list[str] = []
    depth = 0
    for line in text.splitlines():
        if depth:
            lines[-1] += line.strip()
        else:
            lines.append(line)
        depth += line.count("[") - line.count("]")
    return "\n".join(lines)


def final_losses(folder: Path, teachers: Sequence[str]) -> dict[str, float]:
    """Compute a run's summary and spatial loss: unweighted means over teachers and its last records.

    Args:
        folder: of the run.
        teachers: names of those whose losses count.
    """
    records = [record for record in read_records(folder / LOG) if "loss" in record]
    last = records[-max(1, round(_LAST * len(records))) :]
    losses = {}
    for name, kind in (("summary_loss", "summary"), ("feature_loss", "spatial")):
        values = [
            float(value)
            for record in last
            for teacher in teachers
            if (value := record.get(f"{teacher}/{kind}")) is not None
        ]
        if values:
            losses[name] = sum(values) / len(values)
    return losses


def merge(old: RowResult | None, new: RowResult, defaults: Mapping[str, Any]) -> RowResult:
    """Add the scores of an earlier result of the same model that the new one lacks.

    Args:
        old: the earlier result.
        new: the new one.
        defaults: of the settings that decide the model; see `difference`.
    """
    if old is None or difference(old.settings, new.settings, defaults):
        return new
    return replace(
        new,
        values={**old.values, **new.values},
        scores={**old.scores, **new.scores},
        protocols={**old.protocols, **new.protocols},
        data={**old.data, **new.data},
        left_out={key: why for key, why in {**old.left_out, **new.left_out}.items() if key not in new.scores},
        seconds={
            part: old.seconds.get(part, 0) + new.seconds.get(part, 0)
            for part in {**old.seconds, **new.seconds}
        },
    )

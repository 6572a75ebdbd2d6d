"""Images per second and parameters of a table's models, measured side by side in one run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter
from rich.console import Console

from evals.core.report import Value
from evals.throughput import ThroughputSettings
from evals.throughput.evaluator import MeasuredModel, measure_all
from radio.config import to_plain
from radio.hub import choose_window, load_backbone
from radio.io import read_json, write_text
from radio.model import RadioModel
from radio.progress import watch_on
from radio.resources import choose_device, describe_device
from radio.types import Backbone

from ..config import TrainConfig
from ..setup import model_config
from .layout import Line, Runs, TableLayout, seeds_of
from .paper_size import place_weights

FORMAT: Literal["am-radio-speed/1"] = "am-radio-speed/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What one line's model takes."""

    images_per_second: Value
    parameters: Value  # in millions


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """Content of a table's file."""

    lines: dict[str, Speed]
    device: str
    format: Literal["am-radio-speed/1"] = FORMAT

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


_FILE = TypeAdapter(Speeds)


def read_speed(results: Path, table: str) -> dict[str, Speed]:
    """Read a table's speeds by its lines' labels; empty where they are not measured.

    Raises:
        DataError: the file is damaged.
    """
    path = _path(results, table)
    return read_json(path, _FILE, strict=False).lines if path.is_file() else {}


def measure_speed(table: TableLayout, runs: Runs, results: Path, console: Console) -> None:
    """Measure all models of a table in turns, and write the file; students have random weights.

    Students see images of the table's `speed_resolution`, or of their training's; teachers of their own size.

    Raises:
        RadioError: a teacher's weights are not there, or a student cannot take the size.
    """
    lines = [line for line in table.lines if not line.columns or "images_per_second" in line.columns]
    base = next(iter(runs.values()), table.base)
    device = choose_device(base.device)
    entries = [
        MeasuredModel(
            name=line.label,
            model=_model(line, runs, base),
            paper_name=line.paper_model,
            resolution=(table.speed_resolution or _run(line, runs).resolution) if line.run else None,
        )
        for line in lines
    ]
    settings = ThroughputSettings(
        batches=None if table.size == "paper" else (8,),
        preset="paper" if table.size == "paper" else None,
    )
    progress = watch_on(console, shown=console.is_terminal)
    measured = measure_all(entries, settings, device, progress=progress)
    speeds = {
        line.label: Speed(
            images_per_second=round(result.metrics["images_per_second"].value, 2),
            parameters=round(result.metrics["parameters"].value, 2),
        )
        for line, result in zip(lines, measured, strict=True)
    }
    text = json.dumps(to_plain(Speeds(lines=speeds, device=describe_device(device))), indent=1)
    write_text(_path(results, table.name), text + "\n")


def _model(line: Line, runs: Runs, base: TrainConfig) -> Backbone:
    if line.model:
        return choose_window(load_backbone(place_weights(line.model, base)), line.window, line.model)
    config = _run(line, runs)
    torch.manual_seed(0)
    model = RadioModel(model_config(config, {})).eval()
    return choose_window(model, line.window, config.student)


def _run(line: Line, runs: Runs) -> TrainConfig:
    """Return the settings of a line's run: of its first seed."""
    return runs[seeds_of(runs, line.run)[0]]


def _path(results: Path, table: str) -> Path:
    return results / f"speed-{table}.json"

"""Small reports with records and images, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.core.report import DataUsed, Metric, Report, file_name, proportion, write

QUERIES = 40


def metric(value: float) -> Metric:
    return Metric(value=value, low=value - 2, high=value + 2)


class Folder:
    """Writes reports into a folder, each with what belongs to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def add(self, task: str, model: str, **changes: Any) -> Report:
        values: dict[str, Any] = {
            "fingerprint": f"print of {model}",
            "primary_metric": "top1",
            "metrics": {"top1": proportion(30, QUERIES)},
            "settings": {"seed": 0, "resolved": {"ranks": 1}},
            "data": (DataUsed(role="query", name="d", fingerprint="a" * 64, count=QUERIES, num_classes=4),),
            "device": "cpu",
            "seconds": {"total": 1.0},
            "created": "2026-01-02T00:00:00+00:00",
            "versions": {"torch": "2"},
            "files": (),
        }
        report = Report(task=task, model=model, **{**values, **changes})
        write(report, self.path / f"{file_name(task, model)}.json")
        return report

    def records(self, name: str, *lines: Any) -> str:
        (self.path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        return name

    def image(self, name: str, size: tuple[int, int] = (60, 40)) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format="PNG")
        return name


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "reports")


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], Folder]:
    return lambda name: Folder(tmp_path / name)

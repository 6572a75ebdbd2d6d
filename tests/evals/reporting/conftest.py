"""Small reports with records, blocks and images, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.core.blocks import (
    Bars,
    Block,
    Confusions,
    Example,
    Examples,
    ImageGrid,
    ImageRow,
    Lines,
    Table,
)
from evals.core.blocks import Image as ImageFile
from evals.core.report import DatasetInfo, Metric, Report, file_name, write
from evals.core.stats import proportion

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
            "data": (
                DatasetInfo(role="query", name="d", fingerprint="a" * 64, count=QUERIES, num_classes=4),
            ),
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

    def image(self, name: str, size: tuple[int, int] = (60, 40), **changes: Any) -> ImageFile:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format="PNG")
        return ImageFile(**{"file": name, "alt": Path(name).stem, **changes})

    def blocks(self, model: str, value: float, text: str = "") -> tuple[Block, ...]:
        """One block of every kind; `text` is added to all texts of them."""
        start = text.replace("/", "") or model
        images = tuple(
            self.image(f"{start}-images/{number}.png", label=f"label {number} {text}", good=number > 0)
            for number in range(3)
        )
        lines = Lines(
            title=f"accuracy over k{text}",
            x_label="k",
            y_label=f"top-1 (%){text}",
            x=(1.0, 10.0),
            y=(value, value / 2),
            low=(value - 1, None),
            high=(value + 1, None),
            log_x=True,
            caption=f"Curves.{text}",
        )
        bars = Bars(
            title=f"colors{text}",
            x_label=f"%{text}",
            names=(f"red{text}", f"green{text}"),
            values=(value, None),
            low=(value - 1, None),
            high=(value + 1, None),
        )
        classes = Table(
            title=f"top-1 of each class{text}",
            columns=(f"class{text}", "count", "top1"),
            rows=tuple((f"class {n}{text}", 10 + n, value / (1 + n)) for n in range(3)),
            compared="top1",
            shared="count",
        )
        weights = Table(
            title=f"largest weights{text}", columns=("weight", "size"), rows=((f"w{text}", 0.5), ("v", 2))
        )
        confusions = Confusions(
            title=f"confusions{text}", rows=((f"a{text}", "b", 5), ("b", f"{model} a", 2))
        )
        wrong = (f"a, taken for b{text}", "key")
        examples = Examples(
            title=f"wrong ones{text}",
            examples=(
                Example(image=images[0], lines=wrong, others=images[1:], good=False),
                Example(image=None, lines=("without an image",)),
            ),
        )
        rows = (
            ImageRow(images=images[:2], name=f"tokens{text}", note=f"8 x 8{text}"),
            ImageRow(images=images[2:]),
        )
        maps = ImageGrid(title=f"maps{text}", rows=rows)
        return lines, bars, classes, weights, confusions, examples, maps


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "reports")


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], Folder]:
    return lambda name: Folder(tmp_path / name)

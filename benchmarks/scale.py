"""Measure how time and memory of the evaluators grow with the data.

- k-NN: 1,000 queries in banks of 768 numbers a vector, through `evals.knn.index`; the peak of the memory over
  the bytes of the bank, the bank included, is at most 1.3.
- COCO: an instances file of seven polygons an image is read and checked, and its masks are made run lengths.
- Records: two reports whose records are written, then compared by `radio-eval compare`.
- Page: a report page of so many models, five tasks each, with tables of 1,000 classes.

Each size has a process of its own. Time is the processor's; memory is what rises above the libraries'.
`growth` is the exponent from one size to the next: 1 is linear, less has a constant part.

    python benchmarks/scale.py [--parts knn coco records page] [--sizes 1000 10000]
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from PIL import Image

from evals.core import blocks
from evals.core.evaluator import Evaluator, Result, RunSettings, report_result
from evals.core.report import DatasetInfo, Metric, Record, Report, write
from evals.core.stats import proportion
from evals.knn.index import Index, load_faiss
from evals.reporting import CompareOptions, ReportOptions
from evals.reporting.command import run_compare, run_report
from evals.sam_dropin.data import open_instances, run_lengths
from radio.benchmark import MIB, peak_memory
from radio.config import CountOrZero, check

Part = Literal["knn", "coco", "records", "page"]

SIZES: dict[Part, tuple[int, ...]] = {
    "knn": (100_000, 300_000, 1_000_000),
    "coco": (1_000, 10_000, 100_000),
    "records": (10_000, 100_000, 1_000_000),
    "page": (5, 20, 50),
}
UNITS: dict[Part, str] = {"knn": "vectors", "coco": "annotations", "records": "samples", "page": "models"}
WIDTH, QUERIES, NEIGHBOURS = 768, 1000, 20
BANK_LIMIT = 1.3  # peak memory over the bytes of the bank
GROWTH_LIMIT = 1.2  # of the last step; 1 is linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    parts: tuple[Part, ...] = ("knn", "coco", "records", "page")
    sizes: tuple[CountOrZero, ...] = ()
    """Default: those of each part."""
    threads: int = 2
    alone: bool = False
    """Measure the one part at the one size in this process, and print a line of JSON."""


def knn(size: int, folder: Path) -> Callable[[], object]:
    """Prepare a search in a bank of random vectors."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(QUERIES, WIDTH, generator=generator)
    some = torch.randn(2000, WIDTH, generator=generator)
    Index(some, torch.arange(len(some))).search(queries, NEIGHBOURS)  # the libraries take their buffers

    def job() -> object:
        bank = torch.empty(size, WIDTH)
        for turn, block in enumerate(bank.split(len(some))):  # rolled vectors are new ones, and quickly made
            block.copy_(some.roll(turn, dims=1)[: len(block)])
        return Index(bank, torch.arange(size)).search(queries, NEIGHBOURS)

    return job


def coco(size: int, folder: Path) -> Callable[[], object]:
    """Prepare an instances file, and its images as links to one."""
    file, images = folder / "instances.json", folder / "images"
    images.mkdir()
    Image.new("RGB", (640, 480)).save(folder / "image.png")
    count = -(-size // 7)
    for index in range(count):
        (images / f"{index:06d}.png").hardlink_to(folder / "image.png")

    def annotation(id: int) -> str:
        x, y, r = 50 + id * 37 % 500, 50 + id * 53 % 350, 20 + id % 25
        points = [(x + r * math.cos(0.21 * n), y + r * math.sin(0.21 * n)) for n in range(30)]
        polygon = [round(value, 2) for point in points for value in point]
        row = {"id": id + 1, "image_id": id // 7, "category_id": id % 80, "iscrowd": 0, "area": 3.1 * r * r}
        return json.dumps({**row, "bbox": [x - r, y - r, 2 * r, 2 * r], "segmentation": [polygon]})

    with file.open("w") as out:
        names = ({"id": n, "file_name": f"{n:06d}.png", "height": 480, "width": 640} for n in range(count))
        out.write(f'{{"images": [{", ".join(map(json.dumps, names))}], "categories": ')
        out.write(json.dumps([{"id": id, "name": f"class {id}"} for id in range(80)]) + ', "annotations": [')
        for id in range(size):
            out.write((", " if id else "") + annotation(id))
        out.write("]}")

    def job() -> object:
        data = open_instances(file, images, limit=None, crowds=True, smallest_area=0.0, memo=None)
        return sum(len(run_lengths(i, image.size)) for image in data.images for i in image.instances)

    return job


@dataclass(frozen=True, kw_only=True, slots=True)
class NoSettings:
    """The settings of an evaluator that has none."""


def records(size: int, folder: Path) -> Callable[[], object]:
    """Prepare two models' records as they are written, and their comparison."""

    def right(index: int, of: int) -> bool:
        return index * of % 10 < 7

    def made(of: int) -> Iterator[Record]:
        for index in range(size):
            yield {
                "id": f"val/n{index % 1000:08d}/image_{index:08d}.jpg",
                "score": int(right(index, of)),
                "label": f"class {index % 1000}",
                "predictions": [f"class {(index + n) % 1000}" for n in range(5)],
            }

    def save(of: int, name: str) -> Report:
        data = DatasetInfo(role="query", name="d", fingerprint="a" * 64, count=size, num_classes=1000)

        def evaluate(_: Any) -> Result:
            hits = sum(right(index, of) for index in range(size))
            return Result(metrics={"top1": proportion(hits, size)}, data=[data], records=made(of))

        evaluator = Evaluator(
            name="task", settings=NoSettings, evaluate=lambda model, settings, run: Result(metrics={})
        )
        run = RunSettings(device="cpu")
        return report_result(evaluator, None, NoSettings(), folder / name, evaluate, label="model", run=run)

    def job() -> object:
        save(3, "new")
        save(7, "old")
        return run_compare(CompareOptions(reports=folder / "new", baseline=folder / "old", plain=True))

    return job


def page(size: int, folder: Path) -> Callable[[], object]:
    """Prepare the reports of so many models on five tasks, and their page."""
    reports = folder / "reports"
    for model in range(size):
        for task in ("knn", "zeroshot", "seg", "sam", "other"):
            write(_report(task, f"model-{model:02d}", 40 + model), reports / f"{task}-model-{model:02d}.json")
    return lambda: run_report(ReportOptions(reports=reports, html=folder / "page.html"))


def _report(task: str, model: str, value: float) -> Report:
    classes = [f"class {n}" for n in range(1000)]
    metrics = {
        f"top1{k}": Metric(value=value, low=value - 2, high=value + 2) for k in ("", "_k10", "_k100", "_k200")
    }
    table = blocks.Table(
        title="top-1 of each class",
        columns=("class", "count", "top1"),
        rows=tuple((name, 50, value * (n % 7) / 7) for n, name in enumerate(classes)),
        compared="top1",
        shared="count",
    )
    confusions = blocks.Confusions(
        title="confusions", rows=tuple((classes[n], classes[-1 - n], 500 - n) for n in range(499))
    )
    ks = (10.0, 20.0, 100.0, 200.0)
    lines = blocks.Lines(
        title="top-1 over k", x_label="k", y_label="top-1 (%)", x=ks, y=(value,) * 4, log_x=True
    )
    return Report(
        task=task,
        model=model,
        fingerprint=f"print of {model}",
        primary_metric="top1",
        metrics=metrics,
        settings={"seed": 0, "resolved": {"ranks": 1}},
        data=(DatasetInfo(role="query", name="d", fingerprint="a" * 64, count=50_000, num_classes=1000),),
        device="cpu",
        seconds={"total": 1.0},
        created="2026-01-02T00:00:00+00:00",
        versions={"torch": "2"},
        blocks=(lines, table, confusions),
    )


PARTS: dict[Part, Callable[[int, Path], Callable[[], object]]] = {
    "knn": knn,
    "coco": coco,
    "records": records,
    "page": page,
}


def measure(part: Part, size: int) -> dict[str, float]:
    """Measure the CPU seconds and the peak rise of memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        job = PARTS[part](size, Path(folder))
        with peak_memory(torch.device("cpu")) as peak:
            start = time.process_time()
            job()
            seconds = time.process_time() - start
    return {"seconds": seconds, "memory": peak[0] or math.nan}


def main(settings: Settings) -> int:
    """Print a row for each size; return 1 where a growth or a bank's memory exceeds its limit, else 0."""
    if settings.alone:
        torch.set_num_threads(settings.threads)
        load_faiss().omp_set_num_threads(settings.threads)
        sys.stdout.write("\n" + json.dumps(measure(settings.parts[0], settings.sizes[0])))
        return 0
    fine = True
    for part in settings.parts:
        last: tuple[int, dict[str, float]] | None = None
        growth = {"seconds": 0.0, "memory": 0.0}
        for size in settings.sizes or SIZES[part]:
            command = [sys.executable, __file__, "--alone", "--parts", part, "--sizes", str(size)]
            command += ["--threads", str(settings.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if last is not None:
                growth = {k: math.log(found[k] / last[1][k]) / math.log(size / last[0]) for k in found}
            share = found["memory"] / (size * WIDTH * 4) if part == "knn" else 0.0
            fine = fine and share <= BANK_LIMIT
            cells = (
                f"{size:,} {UNITS[part]}",
                f"{found['seconds']:.2f}",
                f"CPU s (growth {growth['seconds']:.2f})" if last else "CPU s",
                f"{found['memory'] / MIB:.0f}",
                f"MiB (growth {growth['memory']:.2f})" if last else "MiB",
                f"= {share:.2f} x the bank" if share else "",
            )
            # The columns of `make bench`: what, how much, by what.
            sys.stdout.write(
                f"| {part}, {cells[0]} | {' '.join(cells[1:]).strip()} | `python benchmarks/scale.py` |\n"
            )
            sys.stdout.flush()
            last = (size, found)
        fine = fine and max(growth.values()) <= GROWTH_LIMIT
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(check(tyro.cli(Settings, description=__doc__))))

"""What the long recipes promise. Minutes to an hour each, so all of them are slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from evals.core.report import Report, read
from radio import entry

pytestmark = pytest.mark.slow
REAL_IMAGES = os.environ.get("AM_RADIO_DATA")  # photos-*.tar and the unpacked cifar10_subset/


@pytest.fixture(autouse=True)
def _all_cores() -> None:
    torch.set_num_threads(os.cpu_count() or 1)


def scores(folder: Path) -> dict[str, float]:
    reports: list[Report] = [read(path) for path in folder.glob("knn-*.json")]
    return {report.model: report.metrics["top1"].value for report in reports}


def test_the_demo_student_learns_most_of_what_its_best_teacher_knows(tmp_path: Path) -> None:
    assert entry.train(["demo", "--out", str(tmp_path / "demo"), "--score", "knn"]) == 0
    top1 = scores(tmp_path / "demo" / "reports")
    best = max(value for name, value in top1.items() if name.startswith("scenes:"))
    assert top1["student"] >= top1["untrained"] + 30
    assert top1["student"] >= 0.75 * best


def test_the_long_run_brings_the_student_up_to_its_best_teacher(tmp_path: Path) -> None:
    assert entry.train(["scenes-long", "--out", str(tmp_path / "long"), "--score", "knn"]) == 0
    top1 = scores(tmp_path / "long" / "reports")
    assert top1["student"] >= max(value for name, value in top1.items() if name.startswith("scenes:")) - 3


@pytest.mark.skipif(REAL_IMAGES is None, reason="AM_RADIO_DATA names no folder of real images")
def test_real_teachers_teach_a_student_something_of_real_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path(REAL_IMAGES or "")
    cifar = data / "cifar10_subset"
    shards = f"{data}/photos-{{000000..000003}}.tar"
    assert entry.train(["real-small", "--data.shards", shards, "--data.images", str(cifar / "train")]) == 0
    sets = ["--bank", str(cifar / "train"), "--query", str(cifar / "val"), "--out", "reports"]
    assert entry.evaluate(["knn", "runs/real-small/ckpt.pt", *sets]) == 0
    assert entry.evaluate(["knn", "runs/real-small/ckpt.pt", "--random-init", *sets]) == 0
    trained, untrained = (
        read(tmp_path / "reports" / f"knn-real-small{suffix}.json").metrics["top1"]
        for suffix in ("", "-untrained")
    )
    assert trained.low is not None and trained.high is not None
    assert untrained.low is not None and untrained.high is not None
    half_widths = (trained.high - trained.low + untrained.high - untrained.low) / 2
    assert trained.value - untrained.value > half_widths

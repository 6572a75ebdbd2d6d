"""radio-eval all, killed in each of its tasks, ends like an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.core.report import Metric, read
from radio import entry
from radio.hub import load_teacher
from tests.radio.teachers.releases import mlp2, save_pickled, teacher, trunk

TASKS = ("knn", "zeroshot", "seg", "sam", "vqa")
SMALL = [
    *("--knn.scenes", "1200", "600", "--zeroshot.scenes", "600", "--sam.scenes", "60"),
    *("--seg.scenes", "120", "40", "--seg.iterations", "40", "--seg.save-every", "10"),
    *("--vqa.scenes", "40", "20", "--vqa.max-steps", "6", "--vqa.save-every", "2"),
]
CODE = "import sys; from radio.entry import evaluate; sys.exit(evaluate(sys.argv[1:]))"


def command(checkpoint: Path, out: Path) -> list[str]:
    tasks = ["--tasks", *TASKS]
    return [
        sys.executable,
        "-u",
        "-c",
        CODE,
        "all",
        str(checkpoint),
        "--out",
        str(out),
        "--plain",
        *tasks,
        *SMALL,
    ]


def scores(folder: Path) -> dict[str, dict[str, Metric]]:
    found = {}
    for path in folder.glob("*-*.json"):
        report = read(path)
        kept = {name: m for name, m in report.metrics.items() if not m.unit.endswith("/s")}
        found[report.task] = kept
    return found


@pytest.mark.slow
def test_kill_9_in_every_task_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    assert entry.train(["smoke", "--data.workers", "0"]) == 0
    checkpoint = tmp_path / "runs" / "smoke" / "ckpt.pt"
    for task in TASKS:
        running = subprocess.Popen(
            command(checkpoint, tmp_path / "killed"), env=environment, stdout=subprocess.PIPE, text=True
        )
        assert running.stdout is not None
        for line in running.stdout:
            if f"{task}: running" in line:
                break
        time.sleep(1.0)  # into the task
        running.send_signal(signal.SIGKILL)
        running.stdout.close()
        assert running.wait() in (-signal.SIGKILL, 0)
    subprocess.run(command(checkpoint, tmp_path / "killed"), env=environment, check=True)
    environment["XDG_CACHE_HOME"] = str(tmp_path / "other")
    subprocess.run(command(checkpoint, tmp_path / "whole"), env=environment, check=True)
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert set(scores(tmp_path / "whole")) == set(TASKS)


@pytest.mark.slow
def test_a_released_model_passes_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teachers, heads = [], {}
    for index, (name, member) in enumerate((("clip", "clip"), ("dino", "dense"), ("sam", "sam"))):
        scenes = load_teacher(f"scenes:{member}")
        teachers.append(teacher(name, type="scenes", model=member, use_summary=name != "sam"))
        heads[str(index)] = (mlp2(scenes.summary_dim, 7 * index), mlp2(scenes.token_dim, 11 * index))
    file = save_pickled(tmp_path / "release.pth.tar", trunk(), teachers, heads)
    options = ["--plain", "--tasks", *TASKS, *SMALL]
    assert entry.evaluate(["all", f"radio:{file}", "--out", "reports", *options]) == 0
    assert scores(tmp_path / "reports").keys() == set(TASKS)

"""Tasks of several models in processes: the outcomes are those of one process, and none outlives the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from evals.core import suite
from evals.core.report import read
from evals.core.suite import Contestant, Outcome, run_contestants
from evals.core.task import RunSettings, make_evaluator
from radio.errors import RadioError
from radio.hub import load_backbone
from radio.progress import no_progress


def contestants(out: Path) -> list[Contestant]:
    settings = make_evaluator("knn").settings(scenes=(60, 60), k=(5,))
    return [
        Contestant(
            name=f"seed {seed}",
            load=partial(load_backbone, "arch:vit-tiny12", random_init=True, seed=seed),
            tasks={"knn": settings, "zeroshot": make_evaluator("zeroshot").settings()},
            out=out,
        )
        for seed in (0, 1)
    ]


def test_a_task_has_a_job_for_each_data_set(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    root = str(make_folder(tmp_path / "d"))
    knn = make_evaluator("knn").settings
    jobs = {"knn": knn(scenes=(60, 60), k=(5,)), "knn on imagenet": knn(bank=root, query=root, k=(1,))}
    load = partial(load_backbone, "arch:vit-tiny12", random_init=True)
    for workers in (1, 2):
        outcomes = run_contestants(
            [Contestant(name="m", load=load, tasks=jobs, out=tmp_path / str(workers))],
            run=RunSettings(device="cpu", cache=tmp_path / "cache"),
            workers=workers,
            progress=no_progress,
            log=lambda name, line: None,
        )["m"]
        assert [outcome.task for outcome in outcomes] == ["knn", "knn on imagenet"]
        assert [outcome.report.data[1].name for outcome in outcomes if outcome.report] == ["scenes:val", "d"]


def outcomes_of(out: Path, workers: int, lines: list[str]) -> dict[str, list[Outcome]]:
    return run_contestants(
        contestants(out),
        run=RunSettings(device="cpu", cache=out / "cache"),
        workers=workers,
        progress=no_progress,
        log=lambda name, line: lines.append(f"{name}: {line}"),
    )


def test_processes_give_the_outcomes_of_one(tmp_path: Path) -> None:
    lines: list[str] = []
    alone, together = outcomes_of(tmp_path / "one", 1, []), outcomes_of(tmp_path / "two", 2, lines)
    assert list(together) == list(alone) == ["seed 0", "seed 1"]
    for name, outcomes in alone.items():
        assert [outcome.state for outcome in outcomes] == ["done", "left out"]  # zero-shot needs a text tower
        report, other = outcomes[0].report, together[name][0].report
        assert report is not None
        assert other is not None
        assert other.metrics == report.metrics
        assert read(tmp_path / "two" / f"knn-{name.replace(' ', '-')}.json").metrics == report.metrics
        assert together[name][1] == outcomes[1]
    assert len(lines) == 4
    assert sum("(4 of 4)" in line for line in lines) == 1
    assert any(" left)" in line for line in lines)
    assert {line.split(" ±")[0] for line in lines if "top1" in line} == {
        f"{name}: knn: top1 {outcomes[0].report.metrics['top1'].value:.1f}"
        for name, outcomes in alone.items()
        if outcomes[0].report
    }
    state = json.loads((tmp_path / "two" / "all.json").read_text())
    assert len(state["tasks"]) == 2
    again = outcomes_of(tmp_path / "two", 1, [])
    assert [[outcome.state for outcome in outcomes] for outcomes in again.values()] == [
        ["kept", "left out"]
    ] * 2


def test_a_killed_process_is_an_error(tmp_path: Path) -> None:
    dying = [
        Contestant(name=f"dying {i}", load=partial(os._exit, 1), tasks={"knn": None}, out=tmp_path)
        for i in (0, 1)
    ]  # type: ignore[arg-type]
    with pytest.raises(RadioError, match="a process that scored was killed, perhaps for its memory"):
        run_contestants(
            dying, run=RunSettings(), workers=2, progress=no_progress, log=lambda name, line: None
        )
    assert os.environ.get("OMP_NUM_THREADS") == OMP


OMP = os.environ.get("OMP_NUM_THREADS")


def test_notes_of_several_writers_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = suite.write_text

    def slowly(path: Path, text: str) -> None:
        time.sleep(0.01)
        genuine(path, text)

    monkeypatch.setattr(suite, "write_text", slowly)

    class Noted:
        task, model = "knn", "student"

    report: Any = Noted()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: suite._note(tmp_path, f"knn-{i}", str(i), report), range(16)))
    tasks = json.loads((tmp_path / "all.json").read_text())["tasks"]
    assert tasks == {f"knn-{i}": {"key": str(i), "report": "knn-student.json"} for i in range(16)}


SLEEPER = """
import os, sys, time
from evals.core.suite import _pool

if __name__ == "__main__":
    with _pool(2) as pool:
        futures = [pool.submit(os.getpid), pool.submit(time.sleep, 60), pool.submit(time.sleep, 60)]
        print(futures[0].result(), flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_parent(tmp_path: Path, name: signal.Signals) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.send_signal(name)
    parent.wait(20)
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("a process outlived its parent")

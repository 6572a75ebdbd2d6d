"""Ranks under torchrun, one of them killed or all asked to stop: the run ends like an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radio import checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BESIDE = Path(sys.executable).parent  # torchrun and radio-train
STEPS = 60


def begin(folder: Path, name: str, *options: str) -> subprocess.Popen[str]:
    """`radio-train demo` on two ranks of this machine."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [str(BESIDE / "torchrun"), "--standalone", "--no-python", "--nproc-per-node", "2", *options]
    words += [str(BESIDE / "radio-train"), "demo", "--steps", str(STEPS), "--log-every", "10", "--score"]
    words += ["--save-every", "20", "--out", name]
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def records(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def when(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    """Wait until something is so, while the run goes on."""
    for _ in range(3000):
        if condition():
            return
        assert run.poll() is None
        time.sleep(0.1)
    raise AssertionError("it took too long")


def pid_of(rank: int, agent: int) -> int:
    """The process of a rank: torchrun's child with that number in its environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                known = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            if parent == agent and f"RANK={rank}".encode() in known:
                return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert begin(folder, "whole").wait(600) == 0
    return folder / "whole"


def check_alike(out: Path, undisturbed: Path) -> None:
    pairs = [
        [{k: v for k, v in r.items() if k in ("step", "loss", "grad_norm")} for r in records(o)]
        for o in (out, undisturbed)
    ]
    assert pairs[0] == pairs[1]
    assert pairs[0][-1]["step"] == STEPS
    assert checkpoint.digest(checkpoint.load(out / "ckpt.pt").tensors) == checkpoint.digest(
        checkpoint.load(undisturbed / "ckpt.pt").tensors
    )


def test_a_rank_is_killed_and_torchrun_starts_all_again(tmp_path: Path, undisturbed: Path) -> None:
    run = begin(tmp_path, "killed", "--max-restarts", "1")
    when(lambda: len(records(tmp_path / "killed")) >= 3, run)
    os.kill(pid_of(1, run.pid), signal.SIGKILL)
    assert run.wait(600) == 0, (tmp_path / "killed.log").read_text()
    check_alike(tmp_path / "killed", undisturbed)


def test_torchrun_is_asked_to_stop_and_all_ranks_save(tmp_path: Path, undisturbed: Path) -> None:
    run = begin(tmp_path, "stopped")
    when(lambda: len(records(tmp_path / "stopped")) >= 3, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    said = (tmp_path / "stopped.log").read_text()
    assert "stopped after step 3" in said, said
    states = sorted(path.name for path in (tmp_path / "stopped" / "state").iterdir())
    assert states[-1] > "step-000030"
    assert not any(name.endswith(".tmp") for name in states)
    assert begin(tmp_path, "stopped").wait(600) == 0
    check_alike(tmp_path / "stopped", undisturbed)

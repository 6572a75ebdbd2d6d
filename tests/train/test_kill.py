"""A run that is killed as `kill -9` does, with loader processes at work, ends like one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from radio.config import write_yaml
from train.cli import main
from train.config import TrainConfig

from .conftest import Start, read_records, same_weights, untimed

ROOT = Path(__file__).resolve().parents[2]


def killed(settings: Path, dies_at: int) -> subprocess.CompletedProcess[str]:
    """`radio-train SETTINGS` in a process of its own that does not live to the end."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "TINY_DIES_AT": str(dies_at), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("tiny_teachers.py"))
    words = [sys.executable, script, str(settings)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "dies_at", [8, *(pytest.param(call, marks=pytest.mark.slow) for call in (1, 6, 11, 12))]
)
def test_a_killed_run_goes_on_bit_for_bit(
    config: TrainConfig, start: Start, tmp_path: Path, dies_at: int
) -> None:
    working = replace(config, data=replace(config.data, workers=1))
    start(working, out=tmp_path / "whole").train()
    write_yaml(replace(working, out=tmp_path / "killed"), tmp_path / "settings.yaml")
    done = killed(tmp_path / "settings.yaml", dies_at)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = tmp_path / "killed" / "metrics.jsonl"
    assert written.is_file()
    done_before = len(read_records(tmp_path / "killed"))
    assert dies_at - 2 <= done_before < dies_at  # the teachers may be one step ahead
    with written.open("a") as file:
        file.write('{"step": 99, "lo')  # a line that was being written
    assert main([str(tmp_path / "settings.yaml")]) == 0
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")

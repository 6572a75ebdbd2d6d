"""The SAM drop-in from the command line: a sweep over windows, and what is said without a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.core.report import read
from radio import entry

TRAIN = ["smoke", "--student", "vitdet-tiny12", "--teachers.2.student-resolution", "96", "--steps", "2"]
SMALL = ["--scenes", "6", "--plain", "--out", "o"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")


def test_windows_are_swept_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.train([*TRAIN, "--data.workers", "0"]) == 0
    assert entry.evaluate(["sam", "--arch", "vitdet-tiny12", "--window", "2", "4", "8", *SMALL]) == 0
    out = capsys.readouterr().out
    names = [f"smoke-window{side}" for side in (2, 4, 8)]
    header = next(line for line in out.splitlines() if names[0] in line)
    assert all(name in header for name in names)
    for word in ("miou (%)", "filled_box_miou (%)", "encoder_rate (images/s)"):
        assert any(word in line for line in out.splitlines())
    reports = [read(tmp_path / "o" / f"sam-{name}.json") for name in names]
    assert len({report.fingerprint for report in reports}) == 3
    assert {report.settings["resolved"]["size"] for report in reports} == {96}
    assert entry.evaluate(["sam", "runs/smoke/ckpt.pt", "--window", "3", *SMALL]) == 2
    assert "windows of 3: they do not divide its 8x8 tokens; the nearest windows that do are 2 and 4" in (
        capsys.readouterr().err
    )


def test_an_architecture_without_a_checkpoint_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.evaluate(["sam", "--arch", "vitdet-h14", "--window", "8"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: none of the 0 checkpoints under ") and len(said.splitlines()) == 1
    assert "train one, name a file, or score it untrained with --random-init" in said


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """kill -9 after the first chunks; all records are equal, the report but for time and memory."""
    code = "import sys; from radio.entry import evaluate; sys.exit(evaluate(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "sam", "scenes:sam", "--scenes", "200", "--plain"]

    def start(name: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / name)}
        return subprocess.Popen([*command, "--out", name], env=environment, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    killed = start("killed")
    while len(list((tmp_path / "killed").glob("am-radio/sam/*/*.jsonl"))) < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = len(list((tmp_path / "killed").glob("am-radio/sam/*/*.jsonl")))
    assert 5 <= done < 50
    assert start("killed").wait() == 0
    whole, again = (tmp_path / name / "sam-scenes-sam.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes()
    reports = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, again)]
    for report in reports:
        for key in ("seconds", "created", "sha256", "peak_memory"):
            del report[key]
        for rate in ("encoder_rate", "decoder_rate"):
            del report["metrics"][rate]
    assert reports[0] == reports[1]

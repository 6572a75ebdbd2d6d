"""`radio-eval seg` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from radio import entry

SMALL = ["--scenes", "24", "12", "--iterations", "4", "--device", "cpu", "--plain"]


def test_an_untrained_student_is_scored_without_noise(tmp_path: Path, capfd) -> None:
    command = ["seg", "vit-tiny12", "--random-init", *SMALL, "--save-maps", "2"]
    out = tmp_path / "reports"
    assert entry.evaluate([*command, "--out", str(out), "--cache", str(tmp_path / "cache")]) == 0
    report = json.loads((out / "seg-vit-tiny12-untrained.json").read_text())
    assert (report["task"], report["primary_metric"]) == ("seg", "miou")
    assert 0 <= report["metrics"]["miou"]["value"] <= 100
    assert len(report["files"]) == 6
    shown = capfd.readouterr()
    assert "miou (%)" in shown.out
    for noise in ("mmengine", "OneDL", "WARNING", "INFO"):
        assert noise not in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "."], "neither ADE20K"),
        (["--preset", "paper", "--crop", "100"], "does not take crops of 100x100 px"),
        (["--preset", "scenes", "--stride", "4"], "looks at whole images"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch, capsys, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["seg", "vit-tiny12", "--random-init", *SMALL, "--cache", "cache", *arguments]
    assert entry.evaluate(command) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error


@pytest.mark.slow
def test_torchrun_scores_as_one_process(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    command = [str(scripts / "radio-eval"), "seg", "vit-tiny12", "--random-init", *SMALL]
    here = tmp_path / "here"
    here.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    scores = []
    for name, start in (
        ("one", []),
        ("two", [str(scripts / "torchrun"), "--no-python", "--nproc-per-node", "2"]),
    ):
        rest = ["--out", str(tmp_path / name), "--cache", str(tmp_path / f"cache-{name}")]
        done = subprocess.run(
            [*start, *command, *rest],
            capture_output=True,
            text=True,
            cwd=here,
            env=environment,
            check=True,
        )
        assert done.stdout.count("miou (%)") == 1
        assert "Warning" not in done.stderr
        report = json.loads((tmp_path / name / "seg-vit-tiny12-untrained.json").read_text())
        scores.append(report["metrics"]["miou"]["value"])
    assert scores[0] == pytest.approx(scores[1], abs=1)
    assert list(here.iterdir()) == []  # mmengine would leave a folder where it gathers results

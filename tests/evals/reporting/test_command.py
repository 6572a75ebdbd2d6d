"""radio-eval compare, on reports that the evaluators wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.core.report import read, write
from evals.core.suite import write_noise
from radio import entry

SCORE = ["--scenes", "120", "60", "--k", "5", "--plain"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """k-NN of a teacher, and of an untrained student, on the same images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    assert entry.evaluate(["knn", "scenes:clip", "--out", "good", *SCORE]) == 0
    assert entry.evaluate(["knn", "arch:vit-tiny12", "--out", "poor", *SCORE]) == 0
    return tmp_path / "good", tmp_path / "poor"


def gate(new: Path, old: Path, *more: str) -> int:
    return entry.evaluate(["compare", str(new), "--baseline", str(old), "--plain", *more])


def test_the_gate_lets_equals_pass_and_stops_a_fall(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, poor = folders
    assert gate(good, good, "--fail-on-regression") == 0
    assert "regressions beyond 0.5 points: none" in capsys.readouterr().out
    assert gate(poor, good) == 0  # told, not asked to fail
    summary, results = tmp_path / "s.md", tmp_path / "j.xml"
    more = ("--fail-on-regression", "--markdown", str(summary), "--junit", str(results))
    assert gate(poor, good, *more) == 1
    out = capsys.readouterr().out
    assert "regressions beyond 0.5 points: knn top1" in out
    assert "▼ worse" in summary.read_text() and "<failure" in results.read_text()
    assert gate(good, poor, "--fail-on-regression") == 0


def test_edited_records_move_the_gate_at_the_tolerance(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """One query of 60 is 1.67 points: within a tolerance of 2, beyond one of 1."""
    good, _ = folders
    (path,) = good.glob("*.json")
    report = read(path)
    lines = [json.loads(line) for line in (good / report.records).read_text().splitlines()]
    next(line for line in lines if line["score"] == 1)["score"] = 0
    worse = tmp_path / "worse"
    worse.mkdir()
    (worse / report.records).write_text("".join(json.dumps(line) + "\n" for line in lines))
    top = report.metrics["top1"]
    report.metrics["top1"] = type(top)(value=top.value - 100 / 60)
    write(report, worse / path.name)
    assert gate(worse, good, "--fail-on-regression", "--tolerance", "2") == 0
    assert gate(worse, good, "--fail-on-regression", "--tolerance", "1") == 1
    noise = tmp_path / "noise.json"
    for measured, code in ((1.8, 0), (1.6, 1)):  # mean_class falls by as much at most
        write_noise(noise, {"knn": {"top1": measured, "mean_class": 2.0}}, fingerprint="f", repeats=2)
        more = ("--fail-on-regression", "--tolerance", "1", "--noise", str(noise))
        assert gate(worse, good, *more) == code


def test_another_k_is_refused(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    good, _ = folders
    assert entry.evaluate(["knn", "scenes:clip", "--out", "other", *SCORE, "--k", "7"]) == 0
    assert gate(Path("other"), good) == 2
    assert "cannot be compared: k is [7] in the one and [5] in the other" in capsys.readouterr().err
    assert gate(good, good, "--tolerance", "-1") == 2
    assert "tolerance: -1.0 is out of bounds" in capsys.readouterr().err
    assert gate(good, good, "--tolerance", "nan") == 2

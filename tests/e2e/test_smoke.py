"""The commands of the README, end to end and small: train, then score what came out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radio import entry


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert entry.train(["smoke", "--data.workers", "0"]) == 0
    return tmp_path / "runs" / "smoke"


def test_a_run_leaves_what_the_readme_says_and_its_checkpoint_is_scored(run_folder: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "ckpt.pt"} <= {path.name for path in run_folder.iterdir()}
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10]
    assert records[1]["loss"] < records[0]["loss"]
    scenes = ["--scenes", "240", "60", "--k", "5", "--primary-k", "5"]
    assert entry.evaluate(["knn", "runs/smoke/ckpt.pt", *scenes]) == 0
    report = json.loads((run_folder / "reports" / "knn-smoke.json").read_text())
    assert report["task"] == "knn"
    assert 0 <= report["metrics"]["top1"]["value"] <= 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["knn", "nowhere.pt"], "no such checkpoint file"),
        (["knn", "text.pt"], "it is no torch file"),
        (["nn", "x.pt"], "did you mean knn"),
        (["knn", "scenes:clipp"], "did you mean"),
        (["knn", "scenes:clip", "--bank", "empty", "--query", "empty"], "empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    assert entry.evaluate(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error

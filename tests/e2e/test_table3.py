"""`radio-train table3` from beginning to end, on the shipped teachers and with the real evaluators."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.core.report import read
from train.cli import main


@pytest.mark.slow
def test_the_table_of_the_four_balancers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table3", "--steps", "4", "--batch-size", "4", "--log-every", "1", "--data.workers", "0"]
    words += ["--out", str(tmp_path), "--score", "zeroshot", "knn"]
    assert main(words) == 0
    said = capsys.readouterr().out
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in said.splitlines()
        if line.startswith("| ")
    }
    assert cells["paper: RADIO ViT-B/14, AdaLoss balancing"] == ["71.31", "79.77"]
    models = ("naive", "uncertainty", "adaloss", "amtml-kd", "untrained", "scenes:clip", "scenes:dense")
    for model in models:
        report = read(tmp_path / "reports" / f"knn-{model.replace(':', '-')}.json")
        assert cells[model][1].startswith(f"{report.metrics['top1'].value:.1f} ±")
    assert cells["scenes:dense"][0] == ""  # no text tower
    assert cells["amtml-kd: clip summary"][0].startswith("0.5")
    assert said.count("knn: running") == len(models)
    assert main(words) == 0
    again = capsys.readouterr().out
    assert again.count("knn: unchanged, kept") == len(models)
    assert "running" not in again

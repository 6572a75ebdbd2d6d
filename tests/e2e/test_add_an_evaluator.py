"""The evaluator of docs/add_an_evaluator.md, installed as another package, works everywhere ours do."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from evals.core.evaluator import evaluators
from radio import entry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_an_evaluator.md"


@pytest.fixture
def ridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the page's example as the package my-evaluators, with its entry point."""
    list(evaluators)  # our own entries come before this test's
    code, points = (
        re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
        for language in ("python", "toml")
    )
    assert len(code.splitlines()) <= 45
    (table,) = re.findall(r'\[project.entry-points."(.*?)"\]', points)
    name, target = re.findall(r'^(\w+) = "(.*?)"$', points, re.MULTILINE)[0]
    info = tmp_path / "site" / "my_evaluators-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-evaluators\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{table}]\n{name} = {target}\n")
    (tmp_path / "site" / "my_evaluators.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "my_evaluators", raising=False)
    for part in ("_entries", "_plugins"):
        monkeypatch.setattr(evaluators, part, dict(getattr(evaluators, part)))
    monkeypatch.setattr(evaluators, "_plugins_read", False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("ridge")
def test_it_is_in_all_in_the_page_and_paired_in_compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for out, seed in (("old", "0"), ("new", "1")):
        models = ["--arch", "vit-tiny12", "--random-init", "--init-seed", seed]
        tasks = ["--tasks", "ridge", "--limit", "240", "--plain", "--ridge.penalty", "0.5"]
        assert entry.evaluate(["all", *models, *tasks, "--out", out]) == 0
    report = json.loads(Path("new/ridge-vit-tiny12-untrained.json").read_text())
    assert report["settings"]["penalty"] == 0.5 and report["settings"]["limit"] == 240
    capsys.readouterr()
    assert entry.evaluate(["compare", "new", "--baseline", "old", "--plain"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "ridge" in line and "top1" in line]
    assert rows and "paired" in rows[0]
    assert entry.evaluate(["report", "new", "--html", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert (
        page.count("ridge regression") >= 2 and "top-1 of each class" in page
    )  # in the overview and as a section


@pytest.mark.usefixtures("ridge")
def test_a_run_scores_it_while_it_trains_and_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    scored = ["--score", "ridge", "--eval-tasks", "ridge", "--eval-every", "10"]
    assert entry.train(["smoke", "--data.workers", "0", *scored]) == 0
    table = capsys.readouterr().out
    assert re.search(r"\| +ridge \|\n\| model +\| +top1 \(%\) \|", table)
    records = [json.loads(line) for line in Path("runs/smoke/metrics.jsonl").read_text().splitlines()]
    assert any("ridge/top1" in record for record in records)
    assert Path("runs/smoke/reports/ridge-student.json").is_file()

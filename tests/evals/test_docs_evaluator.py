"""The example of docs/add_an_evaluator.md, run as a reader would run it, and on the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evals.cli import main
from evals.core.evaluator import evaluators

PAGE = Path(__file__).parents[2] / "docs" / "add_an_evaluator.md"


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluators, "_entries", dict(evaluators._entries))  # forget the example afterwards
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    session: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        name = f"{PAGE.name}, block {number}"
        exec(compile(block, name, "exec", dont_inherit=True), session)  # noqa: S102
    assert main(["list"]) == 0
    assert "Linear classification of frozen summaries" in capsys.readouterr().out
    assert main(["ridge", "vit-tiny12", "--random-init", "--scenes", "60", "--strength", "2", "--plain"]) == 0
    assert (tmp_path / "reports" / "ridge-vit-tiny12-untrained.json").is_file()

"""The example of docs/add_a_teacher.md, run as a reader would run it: block after block in one session."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from radio.teachers import families

PAGE = Path(__file__).parents[3] / "docs" / "add_a_teacher.md"


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        families, "_entries", dict(families._entries)
    )  # forget the example's family afterwards
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    session: dict[str, object] = {"__name__": "reader"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), session)  # noqa: S102


def test_the_table_names_every_family():
    table = PAGE.read_text(encoding="utf-8").split("## The families that are there")[1]
    missing = [name for name in families if f"`{name}:" not in table]
    assert not missing, f"docs/add_a_teacher.md says nothing of {missing}"

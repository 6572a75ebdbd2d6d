"""The speeds of a table's models: at which sizes they are measured, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from evals.throughput import evaluator as throughput
from radio.benchmark import Protocol
from radio.errors import SizeError
from radio.model import RadioModel
from train.cli import main
from train.setup import model_config
from train.tables import TABLES, make_tables
from train.tables import speed as measuring
from train.tables.layout import runs_of, seeds_of
from train.tables.speed import measure_speed, read_speed

BRIEF = Protocol(batches=(1,), repeats=3, repeat_seconds=0.001, warmup_seconds=0.001)


def test_students_are_measured_at_the_tables_size_and_teachers_at_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "make_protocol", lambda settings: BRIEF)
    seen: dict[str, tuple[int, int]] = {}
    size_of = throughput._size

    def watch(model: object, resolution: int | None) -> tuple[int, int]:
        size = size_of(model, resolution)  # type: ignore[arg-type]
        seen[type(model).__name__] = size
        return size

    monkeypatch.setattr(throughput, "_size", watch)
    (table,) = make_tables("table8", "small")
    measure_speed(table, runs_of(table, table.base, 1), tmp_path, Console(quiet=True))
    speeds = read_speed(tmp_path, "table8")
    assert list(speeds) == ["scenes:sam", "window 3", "window 4", "window 6"]
    assert all(speed.images_per_second > 0 for speed in speeds.values())
    assert seen == {"Frozen": (112, 112), "RadioModel": (144, 144)}
    weights = [speeds[line].parameters for line in ("window 3", "window 4", "window 6")]
    assert weights[0] == weights[1] == weights[2] != speeds["scenes:sam"].parameters


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("name", TABLES)
def test_students_take_the_size_at_which_they_are_measured(name: str, size: str) -> None:
    (table,) = make_tables(name, size)  # type: ignore[arg-type]
    if not table.measures_speed:
        return
    runs = runs_of(table, table.base, 1)
    for line in table.lines:
        if line.run:
            config = runs[seeds_of(runs, line.run)[0]]
            with torch.device("meta"):
                model = RadioModel(model_config(config, {}))
            side = table.speed_resolution or config.resolution
            assert model.nearest_size(side, side) == (side, side)


def test_a_table_is_shown_without_a_speed_that_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SizeError("no such size")

    monkeypatch.setattr(measuring, "measure_speed", refuse)
    monkeypatch.setattr("train.tables.commands.make_rows", lambda *_: 0)
    page = tmp_path / "tables.md"
    assert main(["table10", "--out", str(tmp_path), "--page", str(page), "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "table10: no images per second: no such size" in said
    assert "images/s: not measured yet" in page.read_text()

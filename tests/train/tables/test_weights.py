"""The weights of balanced losses over time: read from logs, printed, written and drawn."""

from __future__ import annotations

import csv
import io
import json
import sys
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
from rich.console import Console

from radio.errors import MissingExtraError
from train.tables.weights import WeightCurve, as_csv, as_svg, read_weights, show_weights


def written(folder: Path, *records: dict[str, float]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def logged_runs(tmp_path: Path) -> dict[str, Path]:
    """A run with fixed weights, and one whose weight for clip goes from 0.5 to 1."""
    steps = range(10, 100, 10)
    moving = [
        {
            "step": step,
            "loss": 1.0,
            "clip/summary_weight": 0.5 + step / 180,
            "dense/summary_weight": 0.5 - step / 180,
        }
        for step in steps
    ]
    return {
        "naive": written(tmp_path / "naive", *({"step": step, "clip/summary": 0.1} for step in steps)),
        "amtml-kd": written(tmp_path / "amtml-kd", *moving),
    }


def test_the_log_gives_the_curves(logged_runs: dict[str, Path]) -> None:
    assert read_weights("naive", logged_runs["naive"]) == []
    clip, dense = read_weights("amtml-kd", logged_runs["amtml-kd"])
    assert (clip.run, clip.teacher, clip.kind) == ("amtml-kd", "clip", "summary")
    assert clip.steps == tuple(range(10, 100, 10))
    assert clip.weights[-1] == 1.0
    assert [a + b for a, b in zip(clip.weights, dense.weights, strict=True)] == pytest.approx([1.0] * 9)


def test_a_teacher_may_come_late(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "run", {"step": 1, "a/spatial_weight": 1.0}, {"step": 2, "b/c/spatial_weight": 2.0}
    )
    assert read_weights("run", folder) == [
        WeightCurve("run", "a", "spatial", (1,), (1.0,)),
        WeightCurve("run", "b/c", "spatial", (2,), (2.0,)),
    ]


def test_the_csv_reads_back(logged_runs: dict[str, Path]) -> None:
    curves = read_weights("amtml-kd", logged_runs["amtml-kd"])
    rows = list(csv.DictReader(io.StringIO(as_csv(curves))))
    assert len(rows) == 18
    assert rows[8] == {"run": "amtml-kd", "teacher": "clip", "loss": "summary", "step": "90", "weight": "1"}


def test_the_figure_is_one_and_the_same_svg_with_every_curve(logged_runs: dict[str, Path]) -> None:
    curves = read_weights("amtml-kd", logged_runs["amtml-kd"])
    other = [curve._replace(run="adaloss", kind="spatial") for curve in curves]
    drawn = as_svg([*other, *curves])
    assert drawn == as_svg([*other, *curves])
    root = Xml.fromstring(drawn)
    texts = [text for element in root.iter("{http://www.w3.org/2000/svg}text") if (text := element.text)]
    for text in (
        "adaloss",
        "amtml-kd",
        "clip summary",
        "dense summary",
        "clip spatial",
        "weight of the loss",
    ):
        assert texts.count(text) == 1
    assert texts.count("step") == 2


def test_five_steps_are_printed_and_the_files_named(logged_runs: dict[str, Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    show_weights(logged_runs, tmp_path, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    head = next(line for line in said.splitlines() if "weight at step" in line)
    assert head.replace("|", " ").split()[3:] == ["10", "30", "50", "70", "90"]
    line = next(line for line in said.splitlines() if "amtml-kd: clip summary" in line)
    assert line.replace("|", " ").split()[3:] == ["0.556", "0.667", "0.778", "0.889", "1.000"]
    assert "naive" not in said
    assert str(tmp_path / "weights.svg") in said
    assert (tmp_path / "weights.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "weights.csv").read_text().startswith("run,teacher,loss,step,weight\n")


def test_fixed_weights_alone_show_nothing(logged_runs: dict[str, Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    show_weights({"naive": logged_runs["naive"]}, tmp_path, console)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert not (tmp_path / "weights.csv").exists()


def test_without_matplotlib_the_csv_is_there_and_the_extra_is_named(
    logged_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"am-radio\[report\]"):
        show_weights(logged_runs, tmp_path, Console(file=io.StringIO()))
    assert (tmp_path / "weights.csv").is_file()

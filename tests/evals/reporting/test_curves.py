"""A run's metrics as curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.reporting.curves import curves_section, read_curves
from evals.reporting.figures import NUM_SLOTS
from radio.errors import DataError


def write_run(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_teachers_share_a_panel_for_each_part_and_keep_their_colour(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        json.dumps(
            {"step": 50, "samples": 800, "loss": 3.0, "a/summary": 0.9, "b/summary": 0.8, "b/spatial": 1}
        ),
        json.dumps(
            {
                "step": 100,
                "loss": 2.0,
                "a/summary": 0.5,
                "b/summary": 0.4,
                "x/y/spatial": 2.0,
                "extra_thing": 7.0,
            }
        ),
    )
    curves = read_curves(run)
    assert curves.teachers == ("a", "b", "x/y") and curves.last_step == 100 and curves.notes == ()
    section = curves_section(run)
    titles = [title for title, _ in section.elements[-1].panels]  # type: ignore[union-attr]
    assert titles == ["loss, all teachers", "summary loss", "spatial loss", "extra thing"]
    loss, summary, spatial, _ = curves.panels.values()
    assert loss[0].x == (50.0, 100.0) and loss[0].y == (3.0, 2.0)
    assert loss[0].color == NUM_SLOTS - 1  # no teacher's
    assert [(one.name, one.color, one.y) for one in summary] == [
        ("a", 0, (0.9, 0.5)),
        ("b", 1, (0.8, 0.4)),
    ]
    assert [(one.name, one.color, one.x) for one in spatial] == [
        ("b", 1, (50.0,)),
        ("x/y", 2, (100.0,)),
    ]


def test_other_names_in_two_parts_share_a_panel_of_the_first(tmp_path: Path) -> None:
    record = {"step": 1, "a/spatial": 1.0, "time/data": 0.25, "time/backward": 0.5, "knn/top1": 40.0}
    curves = read_curves(write_run(tmp_path / "run", json.dumps(record)))
    assert curves.teachers == ("a",)
    panels = {
        part: [(one.name, one.color, one.y) for one in series] for part, series in curves.panels.items()
    }
    assert panels == {
        "spatial": [("a", 0, (1.0,))],
        "time": [("data", 0, (0.25,)), ("backward", 1, (0.5,))],
        "knn": [("top1", 0, (40.0,))],
    }


def test_a_loss_without_weight_is_dashed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", json.dumps({"step": 1, "sam/summary": 1.0, "sam/spatial": 0.5}))
    (run / "config.yaml").write_text(
        "teachers:\n- {name: sam, model: 'scenes:sam', summary_weight: 0.0, spatial_weight: 1.0}\n"
    )
    (summary,), (spatial,) = read_curves(run).panels.values()
    assert summary.dashed and summary.name == "sam (weight 0)"
    assert not spatial.dashed
    (run / "config.yaml").write_text("teachers: [1, {]")  # damaged settings only lose the dashes
    assert not read_curves(run).panels["summary"][0].dashed


def test_a_cut_off_line_and_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        '{"step": 1, "loss": NaN, "lr": 0.5, "grad_norm": "big", "flag": true}',
        '{"step": 2, "lr": 0.25, "loss": 1.5}',
        '{"step": 3, "lo',
    )
    curves = read_curves(run)
    assert [(part, series[0].y) for part, series in curves.panels.items()] == [
        ("loss", (1.5,)),
        ("lr", (0.5, 0.25)),
    ]
    assert curves.notes == ("1 lines of metrics.jsonl could not be read and are left out",)


def test_a_folder_that_is_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder; name the folder that radio-train wrote"):
        read_curves(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl"):
        read_curves(tmp_path)
    with pytest.raises(DataError, match="none of its 2 lines is a record"):
        read_curves(write_run(tmp_path / "run", "x", "[1]"))

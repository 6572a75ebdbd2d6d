"""The paper's table 6: which students, at which size, and in small one by one."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evals.core.report import read
from radio import entry
from radio.dist import Group
from radio.errors import ConfigError, SizeError
from radio.students.timm import TABLE_6
from train.config import DataConfig, TrainConfig
from train.recipes.table6 import STUDENTS
from train.tables import rows_of, tables
from train.trainer import Trainer


def rows(name: str = "table6", **changes: Any) -> dict[str, TrainConfig]:
    table = tables[name]()
    return rows_of(table, replace(table.base, **changes))


def test_one_student_or_all_each_in_a_folder_of_its_own() -> None:
    runs = rows()
    assert list(runs) == [run.student for run in runs.values()] == list(STUDENTS)
    assert {f"timm:{name}" for name in TABLE_6} | {"e-radio-b", "e-radio-b-noup", "e-radio-l"} < set(STUDENTS)
    assert len({run.out for run in runs.values()}) == len(runs) == 15
    (one,) = rows(student="timm:resnetv2_101").values()
    assert one.out == Path("runs/table6/timm-resnetv2_101")
    assert one == runs["timm:resnetv2_101"]
    with pytest.raises(ConfigError, match="unknown student 'e-radio-q'"):
        rows(student="e-radio-q")


def test_students_are_trained_at_the_nearest_size_that_they_take() -> None:
    sides = {name: run.resolution for name, run in rows().items()}
    assert sides["e-radio-b"] == 128  # windows of 4 at a stride of 32
    assert sides["vit-b14"] == 98
    assert {sides[f"timm:{name}"] for name in TABLE_6} == {96}
    assert {run.resolution for run in rows("table6-paper").values()} == {224}


def test_the_papers_settings() -> None:
    config = tables["table6-paper"]().base
    assert (config.batch_size, config.steps, config.resolution) == (4096, 600_000, 224)
    assert [teacher.model.partition("@")[0] for teacher in config.teachers] == [
        "openclip:ViT-H-14",
        "dinov2:vitg14",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_five_steps_give_every_parameter_a_finite_gradient_and_a_checkpoint_that_is_scored(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(scenes=20, workers=0)
    small = rows(student=student, steps=5, batch_size=2, resolution=64, data=data, device="cpu")
    (config,) = small.values()
    run = Trainer(config, Group(), torch.device("cpu"), Console(quiet=True))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    path = run.train()
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(not torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())
    scored = ["knn", str(path), "--scenes", "12", "8", "--k", "3", "--out", "reports", "--plain"]
    assert entry.evaluate(scored) == 0
    report = read(Path("reports") / f"knn-{config.out.name}.json")
    assert report.metadata["model"]["student"] == student
    assert 0 <= report.metrics["top1"].value <= 100
    del run, before, name, parameter
    gc.collect()  # gigabytes, and the next student is as large


def test_a_size_that_its_stride_does_not_divide_is_an_error(tmp_path: Path) -> None:
    (config,) = rows(student="timm:regnety_064", resolution=100).values()
    with pytest.raises(SizeError, match=r"cannot be built for 100 px: its stride of 32 .* nearest is 96"):
        Trainer(replace(config, out=tmp_path), Group(), torch.device("cpu"), Console(quiet=True))


def test_the_command_trains_a_row_and_puts_it_beside_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("train.recipes.table6.STUDENTS", ("timm:test_resnet", "timm:test_vit"))
    monkeypatch.setattr("train.table6_scores.FEW", {"knn": {"scenes": (40, 20)}, "zeroshot": {"scenes": 20}})
    monkeypatch.setattr(
        "train.table6_scores.SPEED", {"window_seconds": 0.0, "warmup_seconds": 0.0, "batches": (2,)}
    )
    arguments = ["table6", "--steps", "2", "--batch-size", "2", "--resolution", "64", "--device", "cpu"]
    assert entry.train([*arguments, "--data.scenes", "20", "--data.workers", "0"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.count("|") > 6}
    report = read(Path("runs/table6/reports/knn-timm-test_resnet.json"))
    assert f"{report.metrics['top1'].value:.1f}" in rows["timm:test_resnet"][2]
    assert float(rows["timm:test_vit"][4]) > 0
    assert Path("runs/table6/reports/quality-against-speed.svg").is_file()
    assert {path.name for path in Path("runs/table6").iterdir()} == {
        "timm-test_resnet",
        "timm-test_vit",
        "reports",
    }

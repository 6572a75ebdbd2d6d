"""One table of students, the untrained student, teachers, and the paper's rows, told apart from ours."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evals.core import suite
from evals.core.paper import TABLE_3, TABLE_5
from evals.core.report import Metric
from evals.core.suite import Outcome
from radio.dist import Ranks
from train import scoring as module
from train.config import TrainConfig
from train.scoring import score


class Fake:
    """A report with one metric."""

    def __init__(self, value: float) -> None:
        self.primary_metric = "top1"
        self.metrics = {"top1": Metric(value=value)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, tuple[str, ...]]]:
    """What was scored, by which tasks; a task's score is how many models came before it."""
    calls: list[tuple[str, Path, tuple[str, ...]]] = []

    def run_all(model: str, jobs: Mapping[str, Any], out: Path, *, name: str, **_: Any) -> list[Outcome]:
        calls.append((name, out, tuple(jobs)))
        report: Any = Fake(float(len(calls)))
        return [
            Outcome(task=task, state="left out", reason="no text")
            if task == "zeroshot" and name.startswith("tiny")
            else Outcome(task=task, state="done", report=report)
            for task in jobs
        ]

    monkeypatch.setattr(suite, "run_all", run_all)
    monkeypatch.setattr(module, "load_backbone", lambda spec, **_: spec)
    return calls


def printed(config: TrainConfig, students: Mapping[str, Path], **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=300)
    score(config, students, config.out / "reports", console, **options)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def cells(lines: list[str], model: str) -> list[str]:
    line = next(line for line in lines if line.startswith(f"| {model} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_several_students_one_untrained_and_each_teacher(
    config: TrainConfig, asked: list[tuple[str, Path, tuple[str, ...]]]
) -> None:
    config = replace(config, score=("zeroshot", "knn", "vqa"))
    students = {"naive": config.out / "naive.pt", "adaloss": config.out / "adaloss.pt"}
    lines = printed(config, students)
    names = ["naive", "adaloss", "untrained", "tiny:clip", "tiny:dense", "tiny:sam"]
    assert [name for name, *_ in asked] == names
    assert {out for _, out, _ in asked} == {config.out / "reports"}
    assert [("vqa" in tasks) for *_, tasks in asked] == [True, True, False, False, False, False]
    assert cells(lines, "adaloss") == ["2.0", "2.0", "2.0"]
    assert cells(lines, "untrained") == ["3.0", "3.0", ""]
    assert cells(lines, "tiny:sam") == ["", "6.0", ""]
    assert not any("paper" in line for line in lines)


def test_the_papers_rows_stand_below_and_say_what_they_are(
    config: TrainConfig, asked: list[tuple[str, Path, tuple[str, ...]]]
) -> None:
    config = replace(config, score=("zeroshot", "knn", "seg"))
    lines = printed(config, {"naive": config.out / "ckpt.pt"}, paper=TABLE_3)
    assert cells(lines, "paper: RADIO ViT-B/14, naive balancing") == ["70.63", "79.50", "44.71"]
    assert cells(lines, "paper: RADIO ViT-B/14, uncertainty balancing") == ["70.92", "79.37", "44.57"]
    assert cells(lines, "paper: RADIO ViT-B/14, AdaLoss balancing") == ["71.31", "79.77", "44.36"]
    above = next(place for place, line in enumerate(lines) if "paper: RADIO" in line)
    assert set(lines[above - 1].strip("|+")) == {"-", "+"}  # a rule between ours and theirs
    assert lines[-1] == (
        "paper: AM-RADIO, CVPR 2024, table 3, on other data than the rows above "
        "(zeroshot: ImageNet-1k, top-1; knn: ImageNet-1k, k = 20, top-1; seg: ADE20K, linear probe, mIoU)"
    )


def test_each_data_set_of_a_data_root_has_a_column_and_the_papers_beside_it(
    config: TrainConfig, asked: list[tuple[str, Path, tuple[str, ...]]], tmp_path: Path
) -> None:
    (tmp_path / "data.yaml").write_text("imagenet: in\nade20k: ade\nvoc: voc\n")
    config = replace(config, score=("knn", "seg"), data_root=tmp_path / "data.yaml")
    lines = printed(config, {"student": config.out / "ckpt.pt"}, paper=TABLE_5)
    assert {tasks for *_, tasks in asked} == {("knn on imagenet", "seg on ade20k", "seg on voc")}
    head = next(line for line in lines if "seg on voc" in line)
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "",
        "knn on imagenet",
        "seg on ade20k",
        "seg on voc",
    ]
    assert cells(lines, "tiny:clip") == ["3.0", "3.0", "3.0"]
    assert cells(lines, "paper: RADIO, average pooling") == ["83.83", "38.36", "77.04"]
    assert lines[-1] == "paper: AM-RADIO, CVPR 2024, table 5"


def test_a_teacher_that_is_called_like_a_task_hides_no_evaluation(config: TrainConfig) -> None:
    follower = module.Follower(replace(config, eval_tasks=("knn",)), Ranks(), Console(file=io.StringIO()))
    log = config.out / "metrics.jsonl"
    assert not follower.has_done(4)
    config.out.mkdir()
    log.write_text('{"step": 4, "loss": 1.0, "knn/summary": 0.5}\n[1]\n{"step": 2, "knn/top1": 5.0}\n')
    assert not follower.has_done(4)
    assert follower.has_done(2)


def test_an_evaluation_on_a_data_set_is_known_by_its_name_in_the_log(
    config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "data.yaml").write_text("voc: voc\n")
    config = replace(config, eval_tasks=("seg",), data_root=tmp_path / "data.yaml")
    follower = module.Follower(config, Ranks(), Console(file=io.StringIO()))
    config.out.mkdir()
    (config.out / "metrics.jsonl").write_text(
        '{"step": 2, "seg-voc/miou": 5.0}\n{"step": 4, "seg/miou": 1.0}\n'
    )
    assert follower.has_done(2)
    assert not follower.has_done(4)  # of the generated scenes, before there was a data root

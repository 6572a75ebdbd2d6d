"""The curve is the tasks' own scores at each side, and its index falls where one of them collapses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing

from evals.core.blocks import Lines
from evals.core.evaluator import EvalRun, Result, RunSettings, run_evaluator
from evals.core.report import Metric, Report, read
from evals.core.stats import resamples
from evals.core.task import make_evaluator
from evals.dense_knn import DenseKnnSettings
from evals.depth import DepthSettings
from evals.knn import KnnSettings
from evals.linear import LinearSettings
from evals.open_vocab import OpenVocabSettings
from evals.reporting.compare import compare, read_reports, regressions
from evals.resolution import ResolutionSettings, Task
from evals.resolution import evaluator as resolution
from evals.resolution.evaluator import Scored, _index, choose_sides
from evals.seg_probe.protocol import SegSettings
from evals.zeroshot import ZeroshotSettings
from radio.dist import joined
from radio.errors import ConfigError, SizeError
from radio.types import Features
from tests.evals.zeroshot.conftest import Words


@pytest.fixture
def settings(tmp_path: Path, make_folder: Callable[..., Path]) -> ResolutionSettings:
    """Five classes, 30 images in the bank and 20 to classify, at three sides."""
    bank = make_folder(tmp_path / "d" / "train", classes=5, count=6)
    query = make_folder(tmp_path / "d" / "val", classes=5, count=4, first=100)
    return ResolutionSettings(
        sides=(24, 32, 48),
        knn=KnnSettings(bank=str(bank), query=str(query), k=(3,)),
        zeroshot=ZeroshotSettings(query=str(query), templates="simple"),
    )


def score(task: str, model: Any, settings: Any, out: Path) -> Report:
    run = RunSettings(cache=out.parent / "cache", device="cpu")
    return run_evaluator(make_evaluator(task), model, settings, out, run=run)


def test_the_curve_is_what_the_tasks_score_at_each_side(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    model = backbone()
    model.text = Words()
    report = score("resolution", model, settings, tmp_path / "o")
    values = {name: metric.value for name, metric in report.metrics.items()}
    tasks: tuple[Task, ...] = ("knn", "zeroshot")
    for task in tasks:
        curve = []
        for side in (24, 32, 48):
            own = settings.of_tasks()[task]
            kind: Any = type(own)
            fields = {name: getattr(own, name) for name in own.__dataclass_fields__}
            alone = score(task, model, kind(**{**fields, "size": side}), tmp_path / f"{task}-{side}")
            assert report.metrics[f"{task}_top1_{side}px"] == alone.metrics["top1"]
            curve.append(alone.metrics["top1"].value)
        assert values[f"{task}_index"] == pytest.approx(100 * min(curve) / max(curve))
        block = report.blocks[tasks.index(task)]
        assert isinstance(block, Lines) and block.x == (24, 32, 48) and list(block.y) == curve
    assert report.primary_metric == "index"
    assert values["index"] == min(values["knn_index"], values["zeroshot_index"])
    index = report.metrics["knn_index"]
    assert index.low is not None and index.high is not None and index.low <= index.high <= 100
    assert [(data.role, data.count) for data in report.data] == [("bank", 30), ("query", 20)]
    assert report.files == ()  # no images of single sides
    assert report.compared_settings == ("sides", "tasks")  # where the defaults gave others, they differ
    assert {name: report.settings["resolved"][name] for name in report.compared_settings} == {
        "sides": [24, 32, 48],
        "tasks": ["knn", "zeroshot"],
    }


def test_other_tasks_of_summaries_and_tokens_have_a_curve_too(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    bank, query = settings.knn.bank, settings.knn.query
    assert bank is not None and query is not None
    own = LinearSettings(train=(bank,), val=(query,), c=(1.0,))
    dense = DenseKnnSettings(scenes=(4, 3), memory=20, k=3)
    tasks: tuple[Task, ...] = ("linear", "dense-knn")
    asked = ResolutionSettings(sides=(24, 32), tasks=tasks, linear=own, dense_knn=dense)
    report = score("resolution", backbone(), asked, tmp_path / "o")
    for side in (24, 32):
        alone = score("linear", backbone(), replace(own, size=side), tmp_path / f"linear-{side}")
        assert report.metrics[f"linear_top1_{side}px"] == alone.metrics["top1"]
        alone = score("dense-knn", backbone(), replace(dense, size=side), tmp_path / f"dense-{side}")
        assert report.metrics[f"dense_knn_miou_{side}px"] == alone.metrics["miou"]
    index = report.metrics["dense_knn_index"]
    assert index.low is None and 0 < index.value <= 100  # areas have no score of an image


def test_depth_has_a_curve_whose_index_is_its_best_over_its_worst(
    tmp_path: Path, backbone: Callable[..., Any]
) -> None:
    own = DepthSettings(scenes=(6, 4), iterations=2, train_batch_size=2)
    asked = ResolutionSettings(sides=(24, 48), tasks=("depth",), depth=own)
    report = score("resolution", backbone(), asked, tmp_path / "o")
    curve = []
    for side in (24, 48):
        alone = score("depth", backbone(), replace(own, size=side), tmp_path / f"depth-{side}")
        assert report.metrics[f"depth_rmse_{side}px"] == alone.metrics["rmse"]
        curve.append(alone.metrics["rmse"].value)
    index = report.metrics["depth_index"]
    assert index.value == pytest.approx(100 * min(curve) / max(curve)) and index.higher_is_better is True
    assert index.low is not None and index.high is not None and index.low <= index.high <= 100
    assert isinstance(report.blocks[0], Lines) and report.blocks[0].y_label == "rmse (cm)"


@pytest.mark.parametrize(("task", "names"), [("open-vocab", ("crop", "short_side")), ("seg", ("crop",))])
def test_label_maps_have_a_curve_over_their_crops(
    tmp_path: Path,
    backbone: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    task: Task,
    names: tuple[str, ...],
) -> None:
    """What each side asks of the task's own evaluator; a side that the model does not take is rounded."""
    evaluator, asked = make_evaluator(task), []

    def evaluate(model: Any, settings: Any, run: Any) -> Result:
        asked.append(tuple(getattr(settings, name) for name in names))
        return Result(metrics={"miou": Metric(value=40.0 + len(asked))}, data=[])

    stub = replace(evaluator, evaluate=evaluate)
    monkeypatch.setattr("evals.resolution.evaluator.make_evaluator", lambda _: stub)
    settings = ResolutionSettings(sides=(32, 47), tasks=(task,))
    run = EvalRun(RunSettings(device="cpu"), base="resolution", folder=tmp_path)
    result = resolution.evaluate(backbone(), settings, run)
    assert asked == [(32,) * len(names), (48,) * len(names)]
    assert result.metrics["index"].value == pytest.approx(100 * 41 / 42)
    assert run.notes == [f"47 px was asked for; pooled takes 48, which {task} used"]


def test_the_interval_of_a_mean_over_parts_is_of_that_mean() -> None:
    """One part is right at both sides, the other at one of them: half is kept, whatever is drawn."""
    first = [Scored("a", str(number), f"u{number}", 1.0) for number in range(90)]
    second = [Scored("b", str(number), f"u{number}", 0.0) for number in range(10)]
    better = [each._replace(score=1.0) for each in second]
    values = [Metric(value=50.0), Metric(value=100.0)]
    index = _index(values, [[*first, *second], [*better, *first]], seed=0)
    assert (index.value, index.low, index.high) == (50.0, 50.0, 50.0)
    other = _index([Metric(value=60.0), Metric(value=100.0)], [[*first, *second], [*first, *better]], seed=0)
    assert (other.low, other.high) == (None, None)  # the records do not give the value


def test_the_interval_where_resamples_lack_a_part() -> None:
    """Fourteen classes of one pair each: no resample has all; against a slow loop."""
    curves = [
        [Scored(f"c{n}", f"p{n}", f"p{n:02d}", float(n % period == 0)) for n in range(14)]
        for period in (2, 3)
    ]
    values = [Metric(value=100 * float(np.mean([each.score for each in curve]))) for curve in curves]
    index = _index(values, curves, seed=0)
    ratios = []
    for weights in (each for block in resamples(14) for each in block):
        means = [
            np.mean([each.score for each, w in zip(curve, weights, strict=True) if w]) for curve in curves
        ]
        ratios.append(100 * min(means) / max(means) if max(means) else 0.0)
    assert (index.low, index.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


def test_features_are_cached_side_by_side(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    first, again = backbone(), backbone()
    report = score("resolution", first, settings, tmp_path / "o")
    assert first.images == 3 * 50
    assert score("resolution", again, settings, tmp_path / "p").metrics == report.metrics
    assert again.images == 0


def test_a_collapse_at_one_side_fails_the_gate(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    """The summary of 48 px says nothing: k-NN at the model's own 32 px would not notice."""

    class Collapsing(type(backbone())):  # type: ignore[misc]
        fingerprint = "another"

        def __call__(self, images: Any) -> Features:
            features = super().__call__(images)
            return features._replace(summary=features.summary**0) if images.shape[-1] == 48 else features

    for folder, model in (("main", backbone()), ("night", Collapsing())):
        score("resolution", model, settings, tmp_path / folder)
        score("knn", model, settings.knn, tmp_path / folder)
    changes = compare(read_reports(tmp_path / "night"), read_reports(tmp_path / "main"), tolerance=3)
    worse = {(change.task, change.metric) for change in regressions(changes)}
    assert worse == {
        ("resolution", "index"),
        ("resolution", "knn_index"),
        ("resolution", "knn_top1_48px"),
    }


def test_default_sides_follow_the_models_own(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    """2/3, 1, 3/2, 2 and 3 times 32 px, in steps of 8."""
    plain = ResolutionSettings(knn=settings.knn, zeroshot=settings.zeroshot)
    report = score("resolution", backbone(), plain, tmp_path / "o")
    assert report.settings["resolved"]["sides"] == [24, 32, 48, 64, 96]
    assert not any("was asked for" in note for note in report.notes)
    (note,) = report.notes
    assert note.startswith("zeroshot is left out: pooled has no text tower and learned from no teacher")


def test_sides_are_rounded_and_said(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    asked = ResolutionSettings(sides=(50, 33, 31, 47), tasks=("knn",), knn=settings.knn)
    report = score("resolution", backbone(), asked, tmp_path / "o")
    assert report.settings["resolved"]["sides"] == [31, 47]
    assert report.notes == (
        "31 px was asked for; pooled takes 32x32, which was used",
        "47 px was asked for; pooled takes 48x48, which was used",
    )
    same = ResolutionSettings(sides=(33, 31), tasks=("knn",), knn=settings.knn)
    with pytest.raises(SizeError, match="pooled takes 32x32 px in place of each side of 33, 31, and a curve"):
        score("resolution", backbone(), same, tmp_path / "o")


def test_a_side_that_is_a_size_is_preferred_to_one_that_is_rounded(backbone: Callable[..., Any]) -> None:
    assert choose_sides(backbone(), ResolutionSettings(sides=(31, 32, 48))) == [32, 48]
    assert choose_sides(backbone(), ResolutionSettings(sides=(48, 33, 32, 31, 47))) == [32, 48]


def test_a_model_of_one_size_is_left_out_of_all(backbone: Callable[..., Any]) -> None:
    model, evaluator = backbone(), make_evaluator("resolution")
    assert evaluator.missing_requirements(model) == ""
    model.fixed_size = True
    assert evaluator.missing_requirements(model) == "pooled takes images of one size only"


def test_a_task_that_is_named_and_lacks_something_is_an_error(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings
) -> None:
    named = ResolutionSettings(sides=(24, 32), tasks=("zeroshot",), zeroshot=settings.zeroshot)
    with pytest.raises(ConfigError, match="pooled has no text tower"):
        score("resolution", backbone(), named, tmp_path / "o")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sides": (32,)}, r"--sides \(32,\): a curve needs two or more different sides"),
        ({"sides": (32, 32)}, "a curve needs two or more different sides"),
        ({"sides": (32, 0)}, "sides"),
        ({"tasks": ()}, "--tasks names no task; give one or more, such as knn, or leave it out"),
        (
            {"dense_knn": DenseKnnSettings(size=64)},
            "--dense-knn.size 64: --sides names the sizes; leave it out",
        ),
        ({"seg": SegSettings(crop=64)}, "--seg.crop 64: --sides names the sizes; leave it out"),
        ({"open_vocab": OpenVocabSettings(short_side=64)}, "--open-vocab.short-side 64: --sides names"),
        ({"knn": KnnSettings(size=64)}, "--knn.size 64: --sides names the sizes; leave it out"),
    ],
)
def test_settings_without_a_curve(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ResolutionSettings(**settings)


def _rank(rank: int, port: int, model: Any, settings: ResolutionSettings, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined():
        score("resolution", model, settings, out)


def test_two_ranks_write_the_report_of_one(
    tmp_path: Path, backbone: Callable[..., Any], settings: ResolutionSettings, free_port: int
) -> None:
    asked = replace(settings, tasks=("knn",))
    alone = score("resolution", backbone(), asked, tmp_path / "one" / "out")
    out = tmp_path / "two" / "out"
    multiprocessing.spawn(_rank, (free_port, backbone(), asked, out), nprocs=2, join=True)
    both = read(out / "resolution-pooled.json")
    assert both.metrics == alone.metrics and both.settings["resolved"]["ranks"] == 2

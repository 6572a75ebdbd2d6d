"""Reports of speed: ratios, counts, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.core.evaluator import run_evaluator
from evals.core.report import read
from evals.throughput import ThroughputSettings, make
from evals.throughput.evaluator import (
    COLUMNS,
    MeasuredModel,
    choose_dtype,
    make_protocol,
    report_all,
    speed_rows,
)
from radio.errors import ConfigError, RadioError, SizeError
from radio.hub import load_teacher
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build

SHORT = ThroughputSettings(batches=(1, 2), repeats=5, repeat_seconds=0, warmup_seconds=0)


def tiny(**adaptors: int) -> RadioModel:
    heads = tuple(AdaptorConfig(name=n, summary_dim=d, token_dim=d) for n, d in adaptors.items())
    return build(ModelConfig(student="vit-tiny12", adaptors=heads), 0).eval()


def rows(path: Path) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in speed_rows(read(path))]


def test_one_model_gives_a_report_with_its_counts(tmp_path: Path) -> None:
    report = run_evaluator(make(), tiny(), SHORT, tmp_path, name="mine")
    assert read(tmp_path / "throughput-mine.json") == report
    metrics = report.metrics
    assert metrics["parameters"].value == pytest.approx(1.067296)
    assert metrics["gmacs"].value == pytest.approx(0.082, abs=1e-3)
    best = max(metrics[f"images_per_second_batch_{batch}"].value for batch in (1, 2))
    assert metrics[report.primary_metric].value == best
    assert metrics[report.primary_metric].low <= best <= metrics[report.primary_metric].high  # type: ignore[operator]
    assert report.settings["resolved"]["protocol"]["batches"] == [1, 2]
    assert report.settings["resolved"]["size"] == [96, 96]
    assert report.peak_memory is not None and report.peak_memory > 4


def test_ratios_are_to_the_reference_and_the_papers_stand_beside(tmp_path: Path) -> None:
    entries = [
        MeasuredModel(name="l", model=tiny(), paper_name="e-radio-l"),
        MeasuredModel(name="h", model=tiny(), paper_name="vit-h14"),
        MeasuredModel(name="own", model=tiny()),
    ]
    reports = report_all(entries, SHORT, tmp_path, reference="h")
    assert [report.model for report in reports] == ["l", "h", "own"]
    mine, reference = rows(tmp_path / "throughput-l.json"), rows(tmp_path / "throughput-h.json")
    for one, other in zip(mine, reference, strict=True):
        assert one["ratio"] == pytest.approx(one["images_per_second"] / other["images_per_second"])
        assert one["paper_ratio"] == pytest.approx(3472 / 556)
        assert other["ratio"] == 1.0
    assert rows(tmp_path / "throughput-own.json")[0]["paper_ratio"] is None


def test_adaptors_are_measured_on_top_of_the_backbone(tmp_path: Path) -> None:
    settings = replace(SHORT, with_adaptors=True)
    entries = [MeasuredModel(name="a", model=tiny(clip=64)), MeasuredModel(name="b", model=tiny())]
    report, bare = report_all(entries, settings, tmp_path)
    variants = [(row["variant"], row["batch"]) for row in rows(tmp_path / "throughput-a.json")]
    assert variants == [("alone", 1), ("with adaptors", 1), ("alone", 2), ("with adaptors", 2)]
    assert "images_per_second_batch_2_with_adaptors" in report.metrics
    assert report.metrics["gmacs"] == bare.metrics["gmacs"]  # the backbone's
    with pytest.raises(ConfigError, match="none of the models has adaptors"):
        report_all(entries[1:], settings, tmp_path)


def test_a_teacher_is_counted_without_its_text_tower(tmp_path: Path) -> None:
    teacher = load_teacher("scenes:clip")
    report = run_evaluator(make(), teacher, replace(SHORT, batches=(1,)), tmp_path)
    trunk: Any = getattr(teacher, "trunk")  # noqa: B009 (not of the protocol)
    wanted = sum(parameter.numel() for parameter in trunk.parameters())
    assert report.metrics["parameters"].value == pytest.approx(wanted / 1e6)


def test_a_backbone_that_is_no_module_is_measured_without_counts(
    tmp_path: Path, backbone: Callable[..., Any]
) -> None:
    report = run_evaluator(make(), backbone(), SHORT, tmp_path)
    assert "gmacs" not in report.metrics and report.metrics["images_per_second"].value > 0


def test_threads_are_set_for_the_measurement_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    report = run_evaluator(make(), tiny(), replace(SHORT, threads=before + 1, batches=(1,)), tmp_path)
    assert report.device.endswith(f"{before + 1} threads")
    assert torch.get_num_threads() == before


def test_a_resolution_and_half_precision(tmp_path: Path) -> None:
    settings = replace(SHORT, resolution=48, dtype="bf16", batches=(1,))
    model = tiny()
    report = run_evaluator(make(), model, settings, tmp_path)
    assert report.fingerprint == model.fingerprint == tiny().fingerprint  # its weights were not rounded
    assert report.settings["resolved"]["size"] == [48, 48]
    assert report.settings["resolved"]["dtype"] == "bfloat16"
    with pytest.raises(SizeError, match="cannot take 50x50 px; the nearest size that it can is 48x48"):
        run_evaluator(make(), tiny(), replace(settings, resolution=50), tmp_path)


def test_unknown_references_and_double_names_are_errors(tmp_path: Path) -> None:
    entries = [MeasuredModel(name="first", model=tiny()), MeasuredModel(name="second", model=tiny())]
    with pytest.raises(ConfigError, match=r"reference 'frist' is none of the models .*did you mean first"):
        report_all(entries, SHORT, tmp_path, reference="frist")
    with pytest.raises(ConfigError, match="two models are called first"):
        report_all([entries[0], entries[0]], SHORT, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "timm", "repeats": 3}, "preset timm says how long to measure; leave --repeats"),
        ({"threads": 0}, "threads: 0 is out of bounds"),
        ({"batches": ()}, "--batches names no batch size"),
        ({"batches": (0,)}, r"batches\[0\]: 0 is out of bounds"),
        ({"repeat_seconds": -1.0}, "repeat_seconds: -1.0 is out of bounds"),
        ({"batches": (1, 10**9)}, r"batches\[1\]: 1000000000 is out of bounds"),
        ({"resolution": 10**6}, "resolution: 1000000 is out of bounds"),
        ({"threads": 10**9}, "threads: 1000000000 is out of bounds"),
        ({"repeats": 10**12}, "repeats: 1000000000000 is out of bounds"),
        ({"repeat_seconds": float("nan")}, "repeat_seconds: nan"),
        ({"warmup_seconds": float("inf")}, "warmup_seconds: inf"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RadioError, match=said):
        ThroughputSettings(**changes)


def test_presets_and_batches_of_ones_own() -> None:
    assert make_protocol(ThroughputSettings(preset="timm")).batches == (256,)
    assert make_protocol(ThroughputSettings(preset="timm", batches=(8,))).batches == (8,)
    assert make_protocol(ThroughputSettings(preset="timm", batches=(8,))).warmup_calls == 10
    assert choose_dtype(ThroughputSettings(), torch.device("cpu")) is torch.float32
    assert choose_dtype(ThroughputSettings(), torch.device("cuda")) is torch.bfloat16

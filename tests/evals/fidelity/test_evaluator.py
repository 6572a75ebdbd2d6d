"""What the report says of each teacher, and which teachers, sizes and weights are accepted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from evals.core.blocks import Table
from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.fidelity import FidelitySettings
from evals.fidelity import evaluator as module
from radio.data import open_source
from radio.dist import joined
from radio.errors import CheckpointError, ConfigError, DataError, RadioError
from radio.hub import load_backbone
from radio.images import evaluation_view
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.ops import resize_images

CLIP = load_backbone("scenes:clip")


def make_student(*adaptors: str, seed: int = 0, **changes: Any) -> RadioModel:
    """An untrained student that says it learned from scenes:clip, at 96 px, by adaptors of these names."""
    configs = tuple(AdaptorConfig(name=name, summary_dim=128, token_dim=128) for name in adaptors)
    entry = {"model": "scenes:clip", "fingerprint": CLIP.fingerprint, "resolution": [96, 96], **changes}
    metadata = {"resolution": 96, "teachers": [{"name": name, **entry} for name in adaptors]}
    return build(ModelConfig(student="vit-tiny12", adaptors=configs), seed, metadata, "small").eval()


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., Report]:
    """Runs the evaluator on five scenes."""

    def score(model: Any, settings: FidelitySettings | None = None, **run: Any) -> Report:
        chosen = settings or FidelitySettings(num_images=5)
        shared = RunSettings(**{"cache": tmp_path / "cache", "device": "cpu", **run})
        return run_evaluator(make_evaluator("fidelity"), model, chosen, tmp_path / "o", run=shared)

    return score


def values(report: Report) -> dict[str, float]:
    return {name: metric.value for name, metric in report.metrics.items()}


def test_one_row_a_teacher_with_intervals(score: Callable[..., Report]) -> None:
    model = make_student("clip", "again", student_resolution=108)
    report = score(model)
    parts = ("unexplained", "cka", "backbone_cka", "angle")
    assert list(report.metrics) == ["unexplained", *(f"{p}_{n}" for n in ("clip", "again") for p in parts)]
    (table,) = report.blocks
    assert isinstance(table, Table) and table.columns == ("adaptor", "model", *parts)
    assert [row[:2] for row in table.rows] == [("clip", "scenes:clip"), ("again", "scenes:clip")]
    assert table.rows[0][2:] == tuple(report.metrics[f"{part}_clip"].value for part in parts)
    for name in ("unexplained", "unexplained_clip", "angle_again"):
        metric = report.metrics[name]
        assert metric.low is not None and metric.high is not None and metric.higher_is_better is False
        assert metric.low <= metric.value <= metric.high
    both = [report.metrics[f"unexplained_{name}"].value for name in ("clip", "again")]
    assert report.primary_metric == "unexplained" and report.metrics["unexplained"].value == pytest.approx(
        sum(both) / 2
    )
    (data,) = report.data
    assert (data.role, data.name, data.count) == ("images", "scenes:val", 5)
    assert report.settings["resolved"]["student_size"] == {"clip": [108, 108], "again": [108, 108]}


def test_the_values_are_those_of_a_loop_over_images(score: Callable[..., Report]) -> None:
    """At the student's 108 px beside the teacher's 96, each cut out of the same square."""
    model = make_student("clip", student_resolution=108)
    source = open_source("scenes:val", scenes=5)
    theirs, ours = [], []
    with torch.inference_mode():
        for index in range(5):
            square = evaluation_view(source.read(index), (108, 108), ratio=1.0)[None]
            theirs.append(CLIP(resize_images(square, (96, 96))))
            ours.append(model.adapt("clip", model(square), theirs[-1].grid))
    y, x = (torch.cat([each.tokens for each in side]).double() for side in (theirs, ours))
    unexplained = (x - y).square().sum() / (y - y.mean(dim=(0, 1))).square().sum()
    found = values(score(model))
    assert found["unexplained_clip"] == pytest.approx(100 * float(unexplained), rel=1e-5)
    b, a = (torch.cat([each.summary for each in side]).double() for side in (theirs, ours))
    cosines = torch.cosine_similarity(a, b), torch.cosine_similarity(b, b.mean(dim=0, keepdim=True))
    over = [cosine.arccos().square().mean() for cosine in cosines]
    assert found["angle_clip"] == pytest.approx(100 * float(over[0] / over[1]), rel=1e-5)


def test_a_perfect_student_against_the_model_that_is_named(
    score: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_student("clip")
    seen: list[torch.Tensor] = []
    forward = model.student.forward
    monkeypatch.setattr(
        model.student, "forward", lambda images, crops: (seen.append(images), forward(images, crops))[1]
    )
    exact = model.adaptors["clip"].forward
    monkeypatch.setattr(
        model.adaptors["clip"],
        "forward",
        lambda features, grid=None: CLIP(seen[-1]) if seen else exact(features, grid),
    )
    found = values(score(model, FidelitySettings(num_images=5, teachers=("clip=scenes:clip",))))
    assert found["unexplained"] == found["unexplained_clip"] == found["angle_clip"] == 0
    assert found["cka_clip"] == pytest.approx(100, abs=1e-9) and found["backbone_cka_clip"] < 99


def test_batches_chunks_and_the_cache_change_nothing(
    tmp_path: Path, score: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_student("clip")
    whole = values(score(model))
    monkeypatch.setattr(module, "_CHUNK", 2)
    parts = values(score(model, cache=tmp_path / "other", batch_size=1))
    assert parts == pytest.approx(whole, rel=1e-5)  # the encoders' own rounding
    monkeypatch.setattr(model.student, "forward", None)  # would fail if it was called
    assert values(score(model, cache=tmp_path / "other")) == parts
    for path in (tmp_path / "other" / "fidelity").glob("*/000001.*"):
        path.write_bytes(b"damaged")
    with pytest.raises(TypeError):
        score(model, cache=tmp_path / "other")


def test_a_summary_without_weight_has_no_angle(score: Callable[..., Report]) -> None:
    model = make_student("clip")
    model.metadata["settings"] = {"teachers": [{"name": "clip", "summary_weight": 0.0}]}
    report = score(model)
    assert "angle_clip" not in report.metrics and report.blocks[0].rows[0][-1] is None
    assert "clip: its summary had no weight in training, hence no angle" in report.notes
    again = {"name": "clip-large", "adaptor": "clip", "summary_weight": 1.0}
    model.metadata["settings"]["teachers"].append(again)  # taught at another size
    assert "angle_clip" in score(model).metrics


def test_a_later_stages_summary_without_weight_has_no_angle(score: Callable[..., Report]) -> None:
    """The settings are of the whole run, and their teachers those of its first stage."""
    model = make_student("clip")
    model.metadata["settings"] = {"teachers": [{"name": "other", "summary_weight": 1.0}]}
    model.metadata["teachers"][0]["summary_weight"] = 0.0
    assert "angle_clip" not in score(model).metrics
    model.metadata["teachers"][0]["summary_weight"] = 0.5
    model.metadata["settings"]["teachers"][0] = {"name": "clip", "summary_weight": 0.0}
    assert "angle_clip" in score(model).metrics


def test_images_that_cannot_be_read_are_left_out(
    tmp_path: Path, make_folder: Callable[..., Path], score: Callable[..., Report]
) -> None:
    folder = make_folder(tmp_path / "d", classes=2, count=2)
    (folder / "c0" / "000.png").write_text("no image")
    settings = FidelitySettings(images=str(folder))
    (data,) = score(make_student("clip"), settings).data
    assert data.count == 3 and [skipped.key for skipped in data.skipped] == ["c0/000.png"]
    assert data.num_classes == 0  # labels are not read
    for path in folder.glob("*/*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"d: none of 4 images can be read; c0/000\.png: "):
        score(make_student("clip"), settings)


def test_few_images_of_many_are_spread(
    tmp_path: Path, make_folder: Callable[..., Path], score: Callable[..., Report]
) -> None:
    folder = make_folder(tmp_path / "d", classes=2, count=3)
    counts = {}
    for limit in (None, 3):
        (data,) = score(
            make_student("clip"), FidelitySettings(images=str(folder), num_images=4), limit=limit
        ).data
        counts[limit] = data.count
    assert counts == {None: 4, 3: 3}


def test_teachers_that_are_gone_changed_or_of_other_widths(
    tmp_path: Path, score: Callable[..., Report]
) -> None:
    gone = f"dinov2:vitb14@{tmp_path / 'gone.pth'}"
    with pytest.raises(CheckpointError, match=r"gone\.pth.*if its file has moved, name it with --teachers"):
        score(make_student("clip", model=gone))
    changed = make_student("clip", fingerprint="0" * 64)
    with pytest.raises(ConfigError, match="scenes:clip is not the one that small learned from: its weights"):
        score(changed)
    score(changed, FidelitySettings(num_images=2, teachers=("clip=scenes:clip",)))  # whatever it learned from
    with pytest.raises(ConfigError, match=r"widths \(128, 128\), and scenes:sam has \(\d+, \d+\); compare"):
        score(make_student("clip"), FidelitySettings(teachers=("clip=scenes:sam",)))
    with pytest.raises(ConfigError, match="small has no adaptor 'clap'; did you mean clip"):
        score(make_student("clip"), FidelitySettings(teachers=("clap=scenes:clip",)))


def test_one_image_has_no_dispersion(score: Callable[..., Report]) -> None:
    with pytest.raises(RadioError, match="scenes:clip on scenes:val: its summaries are all the same"):
        score(make_student("clip"), FidelitySettings(num_images=1))


@pytest.mark.parametrize(
    ("adaptors", "changes", "said"),
    [
        ((), {}, "small has no adaptors; fidelity compares those of a distilled student"),
        (("clip",), {"teachers": []}, "small does not say which teachers it learned from; name them with"),
        (("clip",), {"teachers": [{"name": "clip"}]}, "for adaptors of clip"),
        (("clip",), {}, ""),
    ],
)
def test_models_without_teachers_are_left_out_of_all(
    adaptors: tuple[str, ...], changes: dict[str, Any], said: str, score: Callable[..., Report]
) -> None:
    model = make_student(*adaptors)
    model.metadata |= changes
    lack = make_evaluator("fidelity").missing_requirements(model)
    assert said in lack and bool(said) == bool(lack)
    if lack:
        with pytest.raises(ConfigError) as caught:
            score(model)
        assert str(caught.value) == lack


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        (("clip",), "--teachers clip: wanted NAME=MODEL, such as clip=scenes:clip"),
        (("=scenes:clip",), "--teachers =scenes:clip: wanted NAME=MODEL"),
        (("clip=a:b", "clip=c:d"), "--teachers names clip twice; give each adaptor one model"),
    ],
)
def test_settings_that_name_no_model(teachers: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FidelitySettings(teachers=teachers)


def test_the_student_sees_another_side_for_an_adaptor(score: Callable[..., Report]) -> None:
    trained = score(make_student("clip", student_resolution=108))
    told = score(make_student("clip"), FidelitySettings(num_images=5, sides=("clip=108",)))
    assert values(told) == values(trained) != values(score(make_student("clip")))


def test_several_sides_for_an_adaptor_are_compared_one_by_one(score: Callable[..., Report]) -> None:
    model = make_student("clip", "again")
    report = score(model, FidelitySettings(num_images=5, sides=("clip=96", "again=96", "clip=108")))
    for side in (96, 108):
        alone = score(model, FidelitySettings(num_images=5, sides=(f"clip={side}",)))
        for part in ("unexplained", "cka", "backbone_cka", "angle"):
            assert report.metrics[f"{part}_clip_{side}px"] == alone.metrics[f"{part}_clip"]
    assert report.settings["resolved"]["student_size"] == {
        "clip_96px": [96, 96],
        "clip_108px": [108, 108],
        "again": [96, 96],
    }
    each = [report.metrics[f"unexplained_{name}"].value for name in ("clip_96px", "clip_108px", "again")]
    assert report.metrics["unexplained"].value == pytest.approx(sum(each) / 3)


def _rank(rank: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined():
        shared = RunSettings(cache=out.parent / "ranks-cache", device="cpu")
        settings = FidelitySettings(num_images=5)
        run_evaluator(make_evaluator("fidelity"), make_student("clip"), settings, out, run=shared)


def test_two_ranks_write_the_report_of_one(
    tmp_path: Path, score: Callable[..., Report], free_port: int
) -> None:
    alone = score(make_student("clip"))
    multiprocessing.spawn(_rank, (free_port, tmp_path / "ranks"), nprocs=2, join=True)
    both = read(tmp_path / "ranks" / "fidelity-small.json")
    assert values(both) == pytest.approx(values(alone), rel=1e-5)  # the encoders' own rounding
    assert both.settings["resolved"]["ranks"] == 2


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        (("clip",), "--sides clip: wanted NAME=SIDE, such as clip=224"),
        (("clip=0",), "--sides clip=0: wanted NAME=SIDE, a side of 1 to 16384 pixels"),
        (("clip=big",), "--sides clip=big: wanted NAME=SIDE, a side of 1 to 16384 pixels"),
        (("clip=96", "clip=0096"), "--sides names a side of clip twice; give each once"),
        (("dino=96",), "--sides dino: is none of the adaptors that are compared; name some of clip"),
    ],
)
def test_sides_that_cannot_be(sides: tuple[str, ...], said: str, score: Callable[..., Report]) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        score(make_student("clip"), FidelitySettings(num_images=5, sides=sides))

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import multiprocessing

from evals.core.blocks import Table
from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.last_blocks import LastBlocks
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.seg_probe.protocol import SegSettings
from radio.dist import Ranks, joined
from radio.errors import ConfigError, DataError, RadioError
from radio.model import ModelConfig, build
from radio.progress import ProgressFactory, no_progress
from radio.students import ViTDetOptions

SMALL: dict[str, Any] = {"crop": 28, "train_batch_size": 4, "save_maps": 0}


def run(
    model: Any,
    settings: SegSettings,
    out: Path,
    *,
    ranks: Ranks | None = None,
    progress: ProgressFactory = no_progress,
    **changes: Any,
) -> Report:
    """Evaluate on the CPU, with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **changes})
    return run_evaluator(
        make_evaluator("seg"), model, settings, out, run=shared, ranks=ranks, progress=progress
    )


@pytest.fixture
def settings(tmp_path: Path, make_ade: Callable) -> SegSettings:
    root = make_ade(tmp_path / "mine")
    return SegSettings(data=root, iterations=12, lr=0.05, save_every=5, **SMALL)


def head_of(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "seg-patches14.safetensors")


def same_heads(one: Path, other: Path, tolerance: float = 0.0) -> bool:
    heads = head_of(one), head_of(other)
    return all(torch.allclose(heads[0][k], heads[1][k], atol=tolerance, rtol=tolerance) for k in heads[0])


def tables(report: Report) -> dict[str, Table]:
    return {block.title: block for block in report.blocks if isinstance(block, Table)}


def values(report: Report) -> list[float]:
    return [metric.value for metric in report.metrics.values()]


def test_a_report_says_everything(tmp_path: Path, settings: SegSettings, backbone: Callable, capfd) -> None:
    out = tmp_path / "out"
    report = run(backbone(), replace(settings, iterations=60, save_maps=2), out)
    assert capfd.readouterr() == ("", "")
    assert read(out / "seg-patches14.json") == report
    assert (report.task, report.primary_metric) == ("seg", "miou")
    assert list(report.metrics) == ["miou", "macc", "aacc"]
    assert report.metrics["miou"].value > 60  # stripes of pure colours
    for metric in report.metrics.values():
        assert metric.low <= metric.value <= metric.high
    assert [row[0] for row in tables(report)["IoU of each class"].rows] == ["red", "green", "blue"]
    assert [(used.role, used.name, used.count, used.num_classes) for used in report.data] == [
        ("train", "mine/training", 8, 3),
        ("val", "mine/validation", 4, 3),
    ]
    resolved = report.settings["resolved"]
    assert (resolved["preset"], resolved["crop"], resolved["stride"]) == ("paper", [28, 28], [28, 28])
    assert report.versions["onedl-mmsegmentation"]
    assert report.files[:2] == ("seg-patches14.jsonl", "seg-patches14.safetensors")
    assert len(report.files) == 6
    for name in report.files:
        assert (out / name).is_file()
    with Image.open(out / report.files[2]) as image:
        assert image.size == (56, 40)
    total = np.zeros((3, 3))
    for line in (out / report.files[0]).read_text().splitlines():
        for place, *pixels in json.loads(line)["areas"]:
            total[:, place] += pixels
    iou = total[0] / (total[1] + total[2] - total[0])
    assert report.metrics["miou"].value == pytest.approx(100 * iou.mean())


def test_the_backbone_sees_crops_that_it_takes_and_stays_frozen(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    model = backbone()
    run(model, settings, tmp_path / "out")
    assert set(model.sizes) == {(28, 28)}
    assert len(model.sizes) == 12 * 4 + 4 * 2  # each test image is 28 x 39 or 37 x 28: two crops
    model = backbone()
    run(model, replace(settings, preset="released"), tmp_path / "whole")
    assert set(model.sizes[48:]) == {(28, 42), (42, 28)}


def test_a_killed_run_goes_on_at_the_exact_iteration(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    whole = run(backbone(), settings, tmp_path / "whole", cache=tmp_path / "other")
    model = backbone()
    model.fail_after = 4 * 7  # images of seven iterations; five are saved
    with pytest.raises(KeyboardInterrupt):
        run(model, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = backbone()
    report = run(again, settings, tmp_path / "out")
    assert len(again.sizes) == 4 * 7 + 8  # iterations 6 to 12, and the test
    assert same_heads(tmp_path / "whole", tmp_path / "out")
    assert report.metrics == whole.metrics


def test_a_finished_head_is_tested_again_and_scores_the_same(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    first = run(backbone(), settings, tmp_path / "one")
    model = backbone()
    second = run(model, settings, tmp_path / "two")
    assert len(model.sizes) == 8  # no training
    assert second.metrics == first.metrics
    assert same_heads(tmp_path / "one", tmp_path / "two")


def test_the_seed_decides_everything_and_workers_nothing(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    run(backbone(), settings, tmp_path / "one")
    torch.rand(3)
    run(backbone(), settings, tmp_path / "two", cache=tmp_path / "a", workers=2)
    assert same_heads(tmp_path / "one", tmp_path / "two")
    before = torch.get_rng_state()
    run(backbone(), settings, tmp_path / "three", cache=tmp_path / "b", seed=1)
    assert not same_heads(tmp_path / "one", tmp_path / "three", 1e-3)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_seeds_give_mean_and_spread(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    alone = [
        run(backbone(), settings, tmp_path / str(seed), seed=seed).metrics["miou"].value for seed in (3, 4)
    ]
    report = run(backbone(), replace(settings, seeds=2), tmp_path / "both", seed=3)
    assert report.metrics["miou"].value == pytest.approx(sum(alone) / 2)
    assert report.metrics["miou"].std == pytest.approx(abs(alone[0] - alone[1]) / 2**0.5)
    assert [row[:2] for row in tables(report)["scores of each head"].rows] == [(3, alone[0]), (4, alone[1])]


def test_kept_tokens_score_what_images_do(tmp_path: Path, settings: SegSettings, backbone: Callable) -> None:
    kept = replace(settings, preset="scenes", crop=None)
    first, again = backbone(), backbone()
    report = run(first, kept, tmp_path / "kept")
    assert len(first.sizes) == 1 + 8 + 4  # one look for the size, then each image once
    assert set(first.sizes) == {(98, 98)}
    run(again, kept, tmp_path / "again", seed=1)
    assert len(again.sizes) == 1
    online = backbone()
    other = run(online, replace(kept, keep_tokens=False), tmp_path / "online")
    assert len(online.sizes) == 12 * 4 + 4
    assert values(report) == pytest.approx(values(other), abs=0.5)  # half precision against full
    assert same_heads(tmp_path / "kept", tmp_path / "online", 0.02)


def test_a_head_on_several_layers_reads_them_side_by_side(tmp_path: Path, settings: SegSettings) -> None:
    student = build(ModelConfig(student="vit-tiny12"), 0).eval()
    settings = replace(settings, crop=24, layers=3)
    report = run(student, settings, tmp_path / "out")
    head = safetensors.torch.load_file(tmp_path / "out" / "seg-vit-tiny12.safetensors")
    assert {tensor.shape[1] for tensor in head.values() if tensor.ndim == 4} == {3 * student.token_dim}
    assert report.settings["layers"] == 3
    with pytest.raises(ConfigError, match="vit-tiny12 has 4 blocks, and --layers asks for the last 5"):
        run(student, replace(settings, layers=5), tmp_path / "out")


def test_the_tokens_of_several_layers_are_those_of_the_blocks() -> None:
    student = build(ModelConfig(student="vit-tiny12"), 0).eval()
    model, images = LastBlocks(student, 2), torch.rand(2, 3, 24, 36)
    with torch.no_grad():
        found, expected = model(images), student.student.intermediate(images, [2, 3])
    assert torch.equal(found.tokens, torch.cat([each.tokens for each in expected], dim=2))
    assert torch.equal(found.summary, expected[1].summary)
    assert found.grid == (2, 3)
    assert model.fingerprint != student.fingerprint
    with pytest.raises(ConfigError, match="e-radio-tiny is no sequence of equal blocks"):
        LastBlocks(build(ModelConfig(student="e-radio-tiny"), 0), 2)


def test_tokens_that_take_too_much_are_not_kept(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    small = replace(settings, preset="scenes", crop=None, token_cache_gb=1e-9)
    report = run(backbone(), small, tmp_path / "out")
    assert any("12 images would take 0.0 GB, so they were not kept" in note for note in report.notes)


def test_the_generated_world_is_the_default(tmp_path: Path, backbone: Callable) -> None:
    settings = SegSettings(scenes=(6, 4), iterations=2, save_maps=0)
    report = run(backbone(), settings, tmp_path / "out")
    assert [(used.name, used.count, used.num_classes) for used in report.data] == [
        ("scenes:train", 6, 11),
        ("scenes:val", 4, 11),
    ]
    limited = run(backbone(), settings, tmp_path / "out", limit=3)
    assert [used.count for used in limited.data] == [3, 3]


@pytest.mark.parametrize("last", ["0010.png", "0008-overlay.png", "seg-patches14.safetensors"])
def test_a_full_disk_leaves_no_maps(
    tmp_path: Path, settings: SegSettings, backbone: Callable, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    genuine = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode == "xb" and last in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=rf"No space left on device: '.*/out/.*{re.escape(last)}'"):
        run(backbone(), replace(settings, save_maps=2), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_voc_is_read_in_its_genuine_layout(tmp_path: Path, make_voc: Callable, backbone: Callable) -> None:
    root = make_voc(tmp_path / "VOC2012", {"train": ["a", "b", "c"], "val": ["d", "e"]})
    settings = SegSettings(data=root, crop=28, iterations=3, train_batch_size=2, save_maps=1)
    report = run(backbone(), settings, tmp_path / "out")
    assert [(used.name, used.count) for used in report.data] == [("VOC2012/train", 3), ("VOC2012/val", 2)]
    assert report.settings["resolved"]["labels"] == "0 to 20 for the 21 classes, 255 for void"
    assert len(tables(report)["IoU of each class"].rows) == 21
    assert "VOC2012/val has 2 images; VOC2012 has 1,449" in report.notes


def test_one_iteration_is_a_training(tmp_path: Path, settings: SegSettings, backbone: Callable) -> None:
    run(backbone(), replace(settings, iterations=1), tmp_path / "out")


def test_the_learning_rate_rises_and_falls(plugin: Any, backbone: Callable) -> None:
    from mmengine.optim import LinearLR, PolyLR

    from evals.seg_probe.protocol import resolve
    from evals.seg_probe.training import _schedules

    plan, _ = resolve(SegSettings(data=Path("x"), preset="paper"), backbone())
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=plan.lr)
    kinds = {"LinearLR": LinearLR, "PolyLR": PolyLR}
    schedules = [kinds[s.pop("type")](optimizer, **s) for s in map(dict, _schedules(plan))]
    rates = []
    for _ in range(4000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert rates[0] == pytest.approx(1e-9)
    assert rates[750] == pytest.approx(1e-3 * 750 / 1499, rel=1e-4)
    assert rates[1500] == pytest.approx(1e-3, rel=1e-4)
    assert rates[3999] == pytest.approx(1e-3 * (160_000 - 3999) / (160_000 - 1500), rel=1e-4)


def test_tiny_and_long_images_are_taken(tmp_path: Path, make_ade: Callable, backbone: Callable) -> None:
    root = make_ade(tmp_path / "odd", sizes=((3, 3), (3, 500), (40, 40)))
    settings = SegSettings(data=root, iterations=3, **SMALL)
    model = backbone()
    run(model, settings, tmp_path / "out")
    assert set(model.sizes) == {(28, 28)}


def test_a_windowed_student_is_probed_like_its_twin_with_global_attention(
    tmp_path: Path, settings: SegSettings
) -> None:
    windowed = build(ModelConfig(student="vitdet-tiny12", options=ViTDetOptions(window=3)), 0).eval()
    probe = replace(settings, preset="scenes", crop=None, layers=2)  # 96 px: 8 x 8 tokens
    reports = [
        run(model, probe, tmp_path / str(model.window)) for model in (windowed, windowed.with_window(None))
    ]
    assert values(reports[0]) == values(reports[1])
    assert "with global attention; --crop 108 keeps the windows" in reports[0].notes[0]
    assert [report.settings["resolved"].get("attention") for report in reports] == ["global", None]


def test_bad_input_is_an_error_before_any_work(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    model = backbone()
    with pytest.raises(DataError, match="nowhere: no such folder"):
        run(model, replace(settings, data=tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown device"):
        run(model, settings, tmp_path / "out", device="tpu")
    bad = next((settings.data / "annotations/training").iterdir())
    Image.new("L", (56, 40), 200).save(bad)
    with pytest.raises(DataError, match="holds the label 200; wanted 1 to 3 for the 3 classes"):
        run(model, settings, tmp_path / "out")
    assert model.sizes == []
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    class Broken(type(backbone())):
        def __call__(self, images):
            features = super().__call__(images)
            return features._replace(tokens=features.tokens * float("nan"))

    with pytest.raises(RadioError, match="iteration 5: the loss is nan; what was saved last stands"):
        run(Broken(), settings, tmp_path / "out")


class _Watch:
    """Records labels, steps and texts."""

    def __init__(self) -> None:
        self.bars: dict[str, list[int]] = {}
        self.texts: list[str] = []

    def __call__(self, label: str, total: int):
        self.bars[label] = [0, total]
        self._label = label
        return self

    def __enter__(self):
        return _Bar(self, self._label)

    def __exit__(self, *_: object) -> None:
        pass


class _Bar:
    def __init__(self, watch: _Watch, label: str) -> None:
        self._watch, self._label = watch, label

    def __call__(self, steps: int) -> None:
        self._watch.bars[self._label][0] += steps

    def set_postfix(self, text: str) -> None:
        self._watch.texts.append(text)


@pytest.mark.parametrize("changes", [{}, {"preset": "released"}])
def test_tokens_that_are_not_finite_get_no_score(
    tmp_path: Path, settings: SegSettings, backbone: Callable, changes: dict[str, Any]
) -> None:
    class Failing(type(backbone())):
        def __call__(self, images):
            features = super().__call__(images)
            if len(self.sizes) > 48:  # the training is over
                features.tokens[0, 0, 0] = torch.nan
            return features

    with pytest.raises(RadioError, match="patches14 gives tokens that are not finite; try --precision fp32"):
        run(Failing(), replace(settings, **changes), tmp_path / "out")
    assert not list(tmp_path.glob("out/seg*"))


def test_an_orientation_and_damage_in_the_cache_are_in_the_notes(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    path = next((settings.data / "images/validation").iterdir())
    Image.open(path).copy().save(path, exif=exif)
    report = run(backbone(), settings, tmp_path / "out")
    assert report.notes[-1].startswith(
        "1 of 4 images of mine/validation have an EXIF orientation, which is not applied"
    )
    for note in (tmp_path / "cache").rglob("seg-*.jsonl"):
        note.write_text("damaged")
    assert (
        "2 damaged files of the cache were made again"
        in run(backbone(), settings, tmp_path / "out").notes[-1]
    )


def test_a_damaged_generated_world_is_made_again_and_noted(tmp_path: Path, backbone: Callable) -> None:
    settings = SegSettings(scenes=(3, 2), iterations=1, save_maps=0)

    def contents() -> dict[Path, bytes]:
        folder = tmp_path / "cache" / "scenes"
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    run(backbone(), settings, tmp_path / "out")
    before = contents()
    next((tmp_path / "cache").rglob("*.jpg")).write_bytes(b"other")
    report = run(backbone(), settings, tmp_path / "out")
    assert contents() == before
    assert any(note.startswith("1 damaged file of the cache was made again") for note in report.notes)


@pytest.mark.parametrize("spoil", ["cut", "altered", "folder"])
def test_a_damaged_state_is_made_again_and_said(
    tmp_path: Path, settings: SegSettings, backbone: Callable, spoil: str
) -> None:
    whole = run(backbone(), settings, tmp_path / "whole")
    (state,) = (tmp_path / "cache" / "seg-heads").iterdir()
    data = state.read_bytes()
    state.unlink()
    if spoil == "folder":
        state.mkdir()
    else:
        middle = len(data) // 2
        state.write_bytes(data[:middle] + (b"" if spoil == "cut" else b"12345678" + data[middle + 8 :]))
    report = run(backbone(), settings, tmp_path / "out")
    assert values(report) == values(whole)
    assert same_heads(tmp_path / "out", tmp_path / "whole")
    assert "1 damaged file of the cache was made again; the first: " in report.notes[-1]


def test_bfloat16_leaves_the_callers_weights_as_they_were(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    class Weighted(type(backbone())):
        def __init__(self):
            super().__init__()
            self.weight = torch.tensor(1 / 3)

        def to(self, device, dtype):
            self.weight = self.weight.to(device, dtype)
            return self

        @property
        def fingerprint(self):
            return f"{float(self.weight):.20f}"

    model = Weighted()
    report = run(model, settings, tmp_path / "out", precision="bf16")
    assert report.fingerprint == Weighted().fingerprint
    assert torch.equal(model.weight, torch.tensor(1 / 3))
    assert report.settings["resolved"]["dtype"] == "bfloat16"


def test_bars_show_iterations_and_the_loss(tmp_path: Path, settings: SegSettings, backbone: Callable) -> None:
    watch = _Watch()
    run(backbone(), settings, tmp_path / "out", progress=watch)
    assert watch.bars == {
        "checking mine/training": [8, 8],
        "checking mine/validation": [4, 4],
        "training patches14": [12, 12],
        "testing patches14": [4, 4],
    }
    assert watch.texts[0].startswith("loss 1.")


def _rank(rank: int, world: int, port: int, model: Any, settings: SegSettings, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with joined():
        report = run(model, settings, out, limit=3)
    (out / f"metrics-{rank}.json").write_text(json.dumps(values(report)))


def test_two_ranks_score_as_one_and_in_memory_as_reloaded(
    tmp_path: Path, settings: SegSettings, backbone: Callable, free_port: int
) -> None:
    """Void pixels are not spread evenly and the images are odd in number: the traps of several ranks."""
    settings = replace(settings, iterations=30)
    alone = run(backbone(), settings, tmp_path / "alone", limit=3, cache=tmp_path / "one")
    out = tmp_path / "ranks"
    out.mkdir()
    multiprocessing.spawn(_rank, (2, free_port, backbone(), settings, out), nprocs=2, join=True)
    both = read(out / "seg-patches14.json")
    assert both.settings["resolved"]["ranks"] == 2
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == values(both)
    model = backbone()
    reloaded = run(model, settings, tmp_path / "reloaded", limit=3)
    assert len(model.sizes) == 2 * 3  # only tested
    assert reloaded.metrics == both.metrics
    assert same_heads(tmp_path / "alone", out, 1e-4)
    assert values(both) == pytest.approx(values(alone), abs=0.2)


def test_a_batch_that_ranks_cannot_share_is_an_error(
    tmp_path: Path, settings: SegSettings, backbone: Callable
) -> None:
    with pytest.raises(ConfigError, match="a batch of 4 does not divide among 3 ranks"):
        run(backbone(), settings, tmp_path / "out", ranks=Ranks(0, 3))

"""The probe learns, resumes bit by bit, and does not depend on batches or ranks."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing

from evals.core.blocks import ImageGrid
from evals.core.evaluator import EvalRun, RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.depth import DepthSettings
from evals.depth import evaluator as module
from evals.depth.data import scene_split
from evals.depth.head import DepthHead
from evals.reporting.compare import compare, paired_interval, read_reports, regressions
from radio.dist import Ranks, joined
from radio.errors import ConfigError, DataError, RadioError, SizeError
from radio.model import ModelConfig, build
from radio.types import Features

SMALL = DepthSettings(scenes=(24, 11), iterations=12, train_batch_size=4, save_every=5, num_shown=2)


def run(
    model: Any, settings: DepthSettings, out: Path, *, ranks: Ranks | None = None, **changes: Any
) -> Report:
    """Evaluate on the CPU, with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **changes})
    return run_evaluator(make_evaluator("depth"), model, settings, out, run=shared, ranks=ranks)


def values(report: Report) -> list[float]:
    return [metric.value for metric in report.metrics.values()]


def scores(out: Path) -> list[float]:
    lines = (out / "depth-patches16.jsonl").read_text().splitlines()
    return [json.loads(line)["score"] for line in lines]


def test_a_report_says_everything_and_the_probe_learns(tmp_path: Path, patches: Callable[..., Any]) -> None:
    model, out = patches(), tmp_path / "out"
    report = run(model, replace(SMALL, iterations=80, lr=0.02), out)
    assert read(out / "depth-patches16.json") == report
    assert list(report.metrics) == ["rmse", "abs_rel", "d1", "d2", "d3", "log10"]
    rmse = report.metrics["rmse"]
    assert (rmse.unit, rmse.higher_is_better) == ("cm", False)
    assert report.metrics["d1"].higher_is_better is True
    assert rmse.low is not None and rmse.high is not None and rmse.low < rmse.value < rmse.high
    assert rmse.value < 0.9 * report.baselines["mean depth"]
    assert rmse.value == pytest.approx(100 * np.mean(scores(out)))
    assert len(model.sizes) == 24 + 11 and set(model.sizes) == {(96, 96)}
    assert [(data.role, data.count, data.scored) for data in report.data] == [
        ("train", 24, False),
        ("test", 11, True),
    ]
    (grid,) = report.blocks
    assert isinstance(grid, ImageGrid)
    assert [(row.name, len(row.images)) for row in grid.rows] == [
        ("images", 2),
        ("truth", 2),
        ("prediction", 2),
    ]
    assert all((out / name).is_file() for name in report.files)
    assert report.settings["resolved"]["warmup"] == round(100 * 80 / 300)


def test_the_baseline_is_the_mean_training_depth(tmp_path: Path, patches: Callable[..., Any]) -> None:
    report = run(patches(), SMALL, tmp_path / "out")
    train, test = scene_split("train", 24, 0), scene_split("val", 11, 0)
    mean = torch.stack([train.read_depth(index) for index in range(24)]).double().mean()
    errors = [(test.read_depth(index).double() - mean).square().mean().sqrt() for index in range(11)]
    assert report.baselines["mean depth"] == pytest.approx(100 * float(sum(errors) / 11), abs=1e-4)


def test_a_killed_run_goes_on_at_the_exact_step(
    tmp_path: Path, patches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(patches(), SMALL, tmp_path / "whole", cache=tmp_path / "other")
    steps: list[int] = []
    original = module.one_cycle

    def kill(step: int, *given: int) -> float:
        steps.append(step)
        if step == 7 and len(steps) == 8:
            raise KeyboardInterrupt
        return original(step, *given)

    monkeypatch.setattr(module, "one_cycle", kill)
    with pytest.raises(KeyboardInterrupt):
        run(patches(), SMALL, tmp_path / "out")
    again = run(patches(), SMALL, tmp_path / "out")
    assert steps == [*range(8), *range(5, 12)]
    assert again.metrics == whole.metrics
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")
    assert run(patches(), SMALL, tmp_path / "more").metrics == whole.metrics
    assert len(steps) == 15  # a finished head is only tested


def test_a_damaged_state_is_made_again_and_noted(tmp_path: Path, patches: Callable[..., Any]) -> None:
    first = run(patches(), SMALL, tmp_path / "out")
    (state,) = (tmp_path / "cache" / "depth-heads").glob("*.pt")
    state.write_bytes(state.read_bytes()[:-40])
    second = run(patches(), SMALL, tmp_path / "again")
    assert second.metrics == first.metrics
    assert any("damaged" in note for note in second.notes)


def test_batches_of_the_encoder_change_nothing(tmp_path: Path, patches: Callable[..., Any]) -> None:
    one, many = (
        run(patches(), SMALL, tmp_path / f"o{size}", cache=tmp_path / f"c{size}", batch_size=size)
        for size in (1, 7)
    )
    assert values(one) == pytest.approx(values(many), rel=1e-6)


def test_another_seed_is_another_head(tmp_path: Path, patches: Callable[..., Any]) -> None:
    evaluator = make_evaluator("depth")
    assert evaluator.with_seed is not None
    again = evaluator.with_seed(SMALL, RunSettings(seed=4), 2)
    assert again == replace(SMALL, head_seed=6)
    first, second = (run(patches(), each, tmp_path / "o") for each in (SMALL, replace(SMALL, head_seed=1)))
    assert first.metrics != second.metrics


def test_compare_pairs_images_and_less_is_better(tmp_path: Path, patches: Callable[..., Any]) -> None:
    good = replace(SMALL, iterations=60, lr=0.02)
    for name, model in (("old", patches()), ("new", _Blind())):
        run(model, good, tmp_path / name)
    new, old = (read_reports(tmp_path / name) for name in ("new", "old"))
    ((after,), (before,)) = new.values(), old.values()
    paired = paired_interval(after, before)
    assert paired is not None and paired[0] > 0
    assert regressions(compare(new, old, tolerance=0.5))[0].metric == "rmse"
    assert next(c.verdict for c in compare(old, new, tolerance=0.5) if c.metric == "rmse") == "better"


def test_a_flip_is_averaged(tmp_path: Path) -> None:
    class Flat(DepthHead):
        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            return maps[:, 0]

    class Stub:
        depth_size = (4, 6)

        def train_batches(self, first: int) -> Any:
            raise AssertionError

        def test_batches(self) -> Any:
            yield [0], [plane, mirrored], truth

    plane, mirrored = (1 + torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    truth = torch.full((1, 4, 6), 2.0)
    split = scene_split("val", 1, 0)
    context = EvalRun(RunSettings(cache=tmp_path, device="cpu"), base="depth", folder=tmp_path)
    head = Flat(1, torch.Generator())
    measures, _, predicted = module.test_head(head, Stub(), (split, split), [0], context)
    expected = (plane[0, 0] + mirrored[0, 0].flip(-1)) / 2
    assert torch.equal(predicted[0], expected)
    assert measures[0, 0] == pytest.approx(float((expected - 2).square().mean().sqrt()))


def test_nyu_from_crops_to_scores(tmp_path: Path, nyu: Path, patches: Callable[..., Any]) -> None:
    settings = DepthSettings(data=nyu, iterations=4, train_batch_size=2, num_shown=1, save_every=2)
    model = patches()
    report = run(model, settings, tmp_path / "out")
    assert model.sizes == [(416, 544)] * 8 + [(480, 640)] * 4
    assert report.settings["resolved"]["lr"] == 3e-4
    assert 0 < report.metrics["rmse"].value < 1000
    other = patches(24)
    report = run(other, replace(settings, iterations=1), tmp_path / "24")
    assert set(other.sizes) == {(408, 552), (480, 648)}
    assert any("does not take 416x544 px; images were resized to 408x552" in note for note in report.notes)
    killed = patches()
    killed.fail_after = 6
    resumed = replace(settings, lr=1e-3)
    with pytest.raises(KeyboardInterrupt):
        run(killed, resumed, tmp_path / "killed")
    again = patches()
    report = run(again, resumed, tmp_path / "killed")
    assert len(again.sizes) == 4 + 4
    assert report.metrics == run(patches(), resumed, tmp_path / "x", cache=tmp_path / "fresh").metrics


def test_an_image_without_depth_is_one_error(tmp_path: Path, nyu: Path, patches: Callable[..., Any]) -> None:
    from PIL import Image

    empty = Image.fromarray(np.zeros((480, 640), dtype=np.uint16))
    empty.save(nyu / "bath_test" / "sync_depth_00001.png")
    settings = DepthSettings(data=nyu, iterations=1, train_batch_size=1)
    with pytest.raises(DataError, match=r"nyu/test: bath_test/rgb_00001\.jpg: no pixel that is scored"):
        run(patches(), settings, tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_training_file_is_the_same_error_from_a_loaders_worker(
    tmp_path: Path, nyu: Path, patches: Callable[..., Any], workers: int
) -> None:
    for number in range(3):
        (nyu / "bath_train" / f"sync_depth_{number:05d}.png").write_bytes(b"none")
    settings = DepthSettings(data=nyu, iterations=1, train_batch_size=1)
    with pytest.raises(
        DataError, match=rf"^{re.escape(str(nyu))}/bath_train/sync_depth_0000\d\.png: [^\n]*$"
    ):
        run(patches(), settings, tmp_path / "out", workers=workers)


def test_a_bad_depth_map_of_the_test_stops_before_the_training(
    tmp_path: Path, nyu: Path, patches: Callable[..., Any]
) -> None:
    (nyu / "bath_test" / "sync_depth_00001.png").write_bytes(b"none")
    model = patches()
    with pytest.raises(DataError, match=r"bath_test/sync_depth_00001\.png: "):
        run(model, DepthSettings(data=nyu, iterations=1, train_batch_size=1), tmp_path / "out")
    assert not model.sizes


class _Blind:
    """Sees nothing."""

    name, fingerprint = "patches16", "blind"
    token_dim = summary_dim = 2
    metadata = adaptors = MappingProxyType({})
    text = weights_file = window = with_window = intermediate = sam = None
    num_blocks, fixed_size, patch_size, native_size = 0, False, 16, (96, 96)
    value = 0.0

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return 96, 96

    def to(self, *given: Any) -> Any:
        return self

    def eval(self) -> Any:
        return self

    def __call__(self, images: torch.Tensor) -> Features:
        tokens = torch.full((len(images), 36, 2), self.value)
        return Features(tokens[:, 0], tokens, (6, 6))


class _Wide(_Blind):
    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return 96, 128


class _Broken(_Blind):
    value = float("nan")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (_Wide(), SizeError, "takes 96x128 px only, and generated scenes are square"),
        (_Broken(), RadioError, "gives values that are not finite"),
    ],
)
def test_a_model_that_cannot_be_probed_is_one_error(
    tmp_path: Path, model: Any, error: type[RadioError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(model, SMALL, tmp_path / "out")


def test_a_batch_that_ranks_cannot_share_is_an_error(
    tmp_path: Path, nyu: Path, patches: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match="a batch of 4 does not divide among 3 ranks"):
        run(patches(), replace(SMALL, data=nyu), tmp_path / "out", ranks=Ranks(0, 3))


def test_a_head_on_several_layers_reads_them_side_by_side(tmp_path: Path) -> None:
    student = build(ModelConfig(student="vit-tiny12"), 0).eval()
    run(student, replace(SMALL, layers=3, iterations=2), tmp_path / "out")
    (state,) = (tmp_path / "cache" / "depth-heads").glob("*.pt")
    weights = torch.load(state, weights_only=True)["head"]
    assert weights["conv.weight"].shape == (256, 3 * student.token_dim, 1, 1)


@pytest.mark.parametrize(
    ("data", "layers", "blocks", "expected"),
    [
        (None, None, 12, 1),
        (Path("nyu"), None, 12, 4),
        (Path("nyu"), None, 3, 1),
        (Path("nyu"), None, 0, 1),
        (Path("nyu"), 2, 12, 2),
    ],
)
def test_nyus_head_reads_four_layers_where_they_are(
    patches: Callable[..., Any], data: Path | None, layers: int | None, blocks: int, expected: int
) -> None:
    model = patches()
    model.num_blocks = blocks
    settings = DepthSettings(data=data, layers=layers)
    number, notes = module.choose_layers(model, settings)
    assert number == expected
    assert len(notes) == (data is not None and layers is None and blocks < 4)
    assert not notes or "the head reads the last layer, not the protocol's last 4" in notes[0]


def test_another_number_of_layers_is_another_report() -> None:
    name = make_evaluator("depth").suffix
    assert name(DepthSettings()) == name(DepthSettings(layers=1)) == ""
    assert name(DepthSettings(layers=4)) == "-4-layers"
    nyu = Path("nyu")
    assert name(DepthSettings(data=nyu)) == name(DepthSettings(data=nyu, layers=4)) == ""
    assert name(DepthSettings(data=nyu, layers=1)) == "-1-layers"


def test_the_number_of_layers_is_compared(tmp_path: Path, patches: Callable[..., Any]) -> None:
    """The default and the same number by name are one protocol."""
    for folder, settings in (("base", SMALL), ("out", replace(SMALL, layers=1))):
        run(patches(), replace(settings, iterations=2), tmp_path / folder)
    first, *_ = compare(read_reports(tmp_path / "out"), read_reports(tmp_path / "base"), tolerance=1)
    assert first.difference == 0


def test_images_of_another_size(tmp_path: Path, patches: Callable[..., Any], nyu: Path) -> None:
    """The side is the training crop's shorter one, and a whole image is larger in proportion."""
    model = patches()
    report = run(model, replace(SMALL, size=48, iterations=2), tmp_path / "out")
    assert set(model.sizes) == {(48, 48)} and report.settings["resolved"]["size"] == [48, 48]
    model = patches()
    own = replace(SMALL, data=nyu, size=208, iterations=2, layers=1)
    run(model, own, tmp_path / "nyu")
    assert set(model.sizes) == {(208, 272), (240, 320)}


def test_too_many_layers_are_an_error(tmp_path: Path, patches: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="--layers asks for the last 4"):
        run(patches(), replace(SMALL, layers=4), tmp_path / "out")


def _rank(rank: int, world: int, port: int, model: Any, settings: DepthSettings, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with joined():
        report = run(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps(values(report)))


@pytest.mark.parametrize("with_files", [False, True])
def test_two_ranks_score_as_one(
    tmp_path: Path, nyu: Path, patches: Callable[..., Any], free_port: int, with_files: bool
) -> None:
    settings = replace(SMALL, iterations=3)
    if with_files:
        settings = replace(settings, data=nyu, iterations=2)
    alone = run(patches(), settings, tmp_path / "alone", cache=tmp_path / "one")
    out = tmp_path / "ranks"
    out.mkdir()
    multiprocessing.spawn(_rank, (2, free_port, patches(), settings, out), nprocs=2, join=True)
    both = read(out / "depth-patches16.json")
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == values(both)
    assert values(both) == pytest.approx(values(alone), rel=1e-5)
    assert len(scores(out)) == len(scores(tmp_path / "alone"))

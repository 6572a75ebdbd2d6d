"""The loop: what it writes, that it repeats bit for bit, and what it learns from."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import radio
from radio import checkpoint
from radio.config import read_yaml
from radio.errors import ConfigError, DataError
from radio.model import RadioModel
from radio.students import StudentOptions, resolve_options
from radio.students.vit import ViT, ViTDetOptions, ViTOptions
from train import trainer as module
from train.config import DataConfig, LossConfig, TrainConfig
from train.data.crops import draw_window
from train.optim import learning_rate
from train.trainer import Trainer

from .conftest import TEACHERS, Start, fill_folder, losses_of, read_records, same_weights, untimed
from .stopping import run_until


def test_a_run_leaves_what_it_should(config: TrainConfig, start: Start) -> None:
    run = start(config)
    path = run.train()
    assert path == config.out / "ckpt.pt"
    assert {file.name for file in config.out.iterdir()} == {
        "ckpt.pt",
        "config.yaml",
        "metrics.jsonl",
        "state",
    }
    assert {file.name for file in (config.out / "state").iterdir()} == {"step-000010", "step-000012"}
    records = read_records(config.out)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["samples"] for record in records] == [4 * step for step in range(1, 13)]
    assert [record["lr"] for record in records] == [
        learning_rate(step, 12, config.optim) for step in range(12)
    ]
    kinds = ("summary", "spatial", "centred_cosine", "unexplained")
    parts = {f"{t.name}/{kind}" for t in TEACHERS for kind in kinds}
    assert parts <= records[0].keys()
    for record in records:
        total = sum(
            record[f"{t.name}/spatial"] + t.summary_weight * record[f"{t.name}/summary"] for t in TEACHERS
        )
        assert record["loss"] == pytest.approx(total, rel=1e-6)
        assert 0 <= record["data_wait"] <= 1
        assert record["images_per_second"] == pytest.approx(4 / record["seconds"])
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    own = replace(config, options=resolve_options(config.student, config.options))
    assert read_yaml(TrainConfig, config.out / "config.yaml") == own


def test_the_checkpoint_is_a_backbone(config: TrainConfig, start: Start) -> None:
    run = start(config, steps=2)
    model = radio.load_backbone(str(run.train()))
    assert isinstance(model, RadioModel)
    assert (model.name, model.native_size, model.summary_dim) == ("run", (48, 48), 128)
    assert model.metadata["provenance"]["step"] == 2
    assert model.metadata["provenance"]["samples"] == 8
    assert [teacher["name"] for teacher in model.metadata["teachers"]] == ["clip", "dense", "sam"]
    features = model(torch.rand(2, 3, 48, 48))
    assert model.adapt("clip", features).summary.shape == (2, 12)
    assert model.adapt("sam", features, (6, 6)).tokens.shape == (2, 36, 20)


def test_log_records_are_means_over_the_steps_between(config: TrainConfig, start: Start) -> None:
    start(config, out=config.out / "each").train()
    start(config, out=config.out / "fives", log_every=5).train()
    each, fives = losses_of(config.out / "each"), read_records(config.out / "fives")
    assert [record["step"] for record in fives] == [5, 10, 12]
    spans = [each[:5], each[5:10], each[10:]]
    assert [record["loss"] for record in fives] == pytest.approx([sum(s) / len(s) for s in spans], rel=1e-9)


def test_an_equal_run_is_equal_and_another_seed_is_not(config: TrainConfig, start: Start) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        start(config, out=config.out / name, seed=seed, steps=6).train()
    assert untimed(config.out / "a") == untimed(config.out / "b")
    assert same_weights(config.out / "a", config.out / "b")
    assert losses_of(config.out / "c") != losses_of(config.out / "a")


def test_workers_change_nothing(config: TrainConfig, start: Start) -> None:
    for workers in (0, 2):
        data = replace(config.data, workers=workers)
        start(config, out=config.out / str(workers), data=data, steps=5).train()
    assert untimed(config.out / "0") == untimed(config.out / "2")


def test_loader_processes_end_well(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is forked by the thread in which the teachers work fails as it ends, and torch may notice."""
    workers: set[Any] = set()
    run = start(config, data=replace(config.data, workers=2), steps=16)  # a worker at its end is gone
    genuine = run.train_step

    def watched(batch: module.Batch) -> None:
        workers.update(multiprocessing.active_children())
        genuine(batch)

    monkeypatch.setattr(run, "train_step", watched)
    run.train()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_the_runs_own_settings_file_runs_it_again(config: TrainConfig, start: Start) -> None:
    start(config, steps=4).train()
    again = read_yaml(TrainConfig, config.out / "config.yaml")
    start(again, out=config.out / "again").train()
    assert losses_of(config.out / "again") == losses_of(config.out)


def test_the_average_of_the_weights(config: TrainConfig, start: Start) -> None:
    run = start(config, ema=0.75, save_every=4, steps=7)
    wanted = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    genuine = run.train_step

    def watched(batch: module.Batch) -> None:
        genuine(batch)
        for name, weight in run.model.named_parameters():
            wanted[name] = 0.75 * wanted[name] + 0.25 * weight.detach()

    run.train_step = watched  # type: ignore[method-assign]
    run.train()
    found = checkpoint.load(config.out / "ckpt-ema.pt").tensors
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    weights = checkpoint.load(config.out / "ckpt.pt").tensors
    assert found.keys() == weights.keys()
    assert not all(torch.equal(found[name], weights[name]) for name in found)
    run_until(start(config, ema=0.75, save_every=4, steps=7, out=config.out / "b"), "teacher_features", 6)
    again = start(config, ema=0.75, save_every=4, steps=7, out=config.out / "b")
    assert again.step == 4
    again.train()
    resumed = checkpoint.load(config.out / "b" / "ckpt-ema.pt").tensors
    assert all(torch.equal(found[name], resumed[name]) for name in found)
    model = radio.load_backbone(str(config.out / "ckpt-ema.pt"))
    assert model.summary_dim == 128


def test_a_few_broken_images_are_counted(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 10, broken=2)
    start(config, data=DataConfig(images=(folder,), workers=0), batch_size=6, steps=4).train()
    counts = [record["broken"] for record in read_records(config.out)]
    assert counts[1] >= 2  # an epoch is two steps, and each broken image is met once in it
    assert counts[-1] >= 4
    assert counts == sorted(counts)


def test_the_count_of_broken_images_survives_a_stop(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    folder = fill_folder(tmp_path / "mixed", 10, broken=1)
    mixed = replace(config, data=DataConfig(images=(folder,), workers=0))
    start(mixed, out=config.out / "whole").train()
    run_until(start(mixed), "teacher_features", 8)
    start(mixed).train()
    assert untimed(config.out) == untimed(config.out / "whole")


def test_too_many_broken_images_stop_the_run(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 3, broken=9)
    with pytest.raises(
        DataError, match=r"\d+ of \d+ images cannot be read; mend the data or raise --data\.max"
    ):
        start(config, data=DataConfig(images=(folder,), workers=0)).train()


def test_shards_and_scenes_are_data_too(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    data = DataConfig(scenes=40, workers=0)
    run = start(config, data=data, steps=2)
    run.train()
    assert run.model.metadata["data"]["sources"][0]["path"] == "scenes:train?seed=2"


@pytest.mark.parametrize("summary", ["per-teacher", "mean"])
def test_other_summaries_train(config: TrainConfig, start: Start, summary: str) -> None:
    run = start(config, summary=summary, steps=4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    model = radio.load_backbone(str(run.train()))
    assert model.summary_dim == (384 if summary == "per-teacher" else 128)
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    # SAM's summary has no weight in the loss: its head moves by weight decay alone.
    still = {n for n in before if n.startswith("adaptors.sam.summary.") or not before[n].numel()}
    assert moved >= set(before) - still


def test_a_plain_vit_trains_by_another_distance_of_the_summaries(config: TrainConfig, start: Start) -> None:
    config = replace(config, options=ViTOptions(cpe=False))
    cosine, squares = (
        start(replace(config, out=config.out / kind, loss=LossConfig(summary=kind)), steps=2)
        for kind in ("cosine", "mse")
    )
    records = []
    for run in (cosine, squares):
        path = run.train()
        records.append(read_records(path.parent)[-1])
        assert radio.load_backbone(str(path)).student.positions.side == 8
    assert records[0].keys() == records[1].keys() >= {"clip/summary", "clip/spatial"}
    assert records[0]["clip/summary"] != records[1]["clip/summary"]


def test_sampled_windows_reach_the_student(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int | None] = []
    genuine = ViT.with_window

    def watched(self: ViT, side: int | None) -> ViT:
        used.append(side)
        return genuine(self, side)

    monkeypatch.setattr(ViT, "with_window", watched)
    run = start(config, student="vitdet-tiny12", resolution=96, windows=(2, 4, 5), batch_size=2)
    used.clear()
    run.train()
    assert run.windows == {96: (2, 4)}
    assert used == [draw_window((2, 4), 0, step) for step in range(12)]
    assert set(used) == {2, 4}


def test_a_window_fixed_by_the_options(config: TrainConfig, start: Start) -> None:
    options = ViTDetOptions(window=2)
    model = radio.load_backbone(str(start(config, student="vitdet-tiny12", options=options, steps=1).train()))
    assert isinstance(model, RadioModel)
    assert model.config.options.window == 2


def test_the_student_may_see_another_resolution_beside_one_teacher(config: TrainConfig, start: Start) -> None:
    teachers = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=96, batch_size=2))
    run = start(config, teachers=teachers, steps=2)
    assert run.sides == ({48: 64}, {96: 108})
    sides: list[tuple[int, ...]] = []
    run.model.student.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape)))
    run.train()
    assert sides == [(4, 3, 48, 48), (2, 3, 96, 96)] * 2
    assert run.model.metadata["teachers"][2]["student_resolution"] == 96


def test_bf16_on_a_cpu(config: TrainConfig, start: Start) -> None:
    for precision in ("fp32", "bf16"):
        start(config, precision=precision, out=config.out / precision).train()
    exact, low = losses_of(config.out / "fp32"), losses_of(config.out / "bf16")
    assert low != exact
    assert low == pytest.approx(exact, rel=0.03)
    tensors = checkpoint.load(config.out / "bf16" / "ckpt.pt").tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_recomputed_activations_change_nothing(config: TrainConfig, start: Start) -> None:
    for recompute in (False, True):
        options = StudentOptions(activation_checkpointing=recompute)
        start(config, options=options, out=config.out / str(recompute), steps=3).train()
    assert losses_of(config.out / "True") == pytest.approx(losses_of(config.out / "False"), rel=1e-6)


def test_the_global_generator_decides_nothing(config: TrainConfig, start: Start) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        start(config, out=config.out / str(seed), steps=3).train()
    assert losses_of(config.out / "1") == losses_of(config.out / "2")


def test_bad_settings_are_told_before_anything_is_written(config: TrainConfig, start: Start) -> None:
    with pytest.raises(ConfigError, match="--log-every: 0 is out of bounds"):
        start(config, log_every=0)
    with pytest.raises(ConfigError, match="unknown student"):
        start(config, student="vit-tiny")
    assert not config.out.exists()


def test_the_settings_file_is_plain(config: TrainConfig, start: Start) -> None:
    start(config, steps=1).train()
    plain = yaml.safe_load((config.out / "config.yaml").read_text())
    assert plain["optim"]["lr"] == 1e-3
    assert plain["teachers"][2]["summary_weight"] == 0.0
    assert plain["data"]["images"] == [str(config.data.images[0])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile
def test_a_compiled_student_trains_alike(config: TrainConfig, start: Start) -> None:
    for compiled in (False, True):
        run: Trainer = start(config, compile=compiled, out=config.out / str(compiled), steps=3)
        run.train()
    assert losses_of(config.out / "True") == pytest.approx(losses_of(config.out / "False"), rel=1e-4)
    assert "ckpt.pt" in {path.name for path in (config.out / "True").iterdir()}

"""Two ranks under torchrun learn what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from radio import checkpoint
from radio.config import write_yaml
from radio.dist import Ranks
from radio.errors import ConfigError
from radio.model import build
from radio.ops import resize_images
from radio.students import TABLE_6, StudentOptions, students
from radio.students.timm import TimmOptions
from train.config import TrainConfig
from train.data.crops import generator, random_view, seed_of, shuffled_index
from train.data.loader import Batch
from train.data.streams import open_images
from train.distributed import Peers, join, synchronise_norms
from train.losses import teacher_losses
from train.setup import check_settings, load_teachers, model_config, teacher_sizes
from train.trainer import Trainer

from .conftest import CPU, TEACHERS, Start, fill_folder, read_records, untimed
from .ranks import on_ranks

ROOT = Path(__file__).resolve().parents[2]


def torchrun(settings: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`radio-train SETTINGS` on two ranks of this machine."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("tiny_teachers.py"))
    words += [script, str(settings), *options]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 16, broken=2)
    shared = replace(config, data=replace(config.data, images=(folder,)), steps=6, log_every=2, save_every=3)
    start(shared, out=tmp_path / "one").train()
    write_yaml(replace(shared, out=tmp_path / "two"), tmp_path / "settings.yaml")
    done = torchrun(tmp_path / "settings.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: ") == 1  # one rank speaks
    one, two = read_records(tmp_path / "one"), read_records(tmp_path / "two")
    assert len(one) == len(two) == 3
    for alone, shared_record in zip(one, two, strict=True):
        for name, value in alone.items():
            if name == "loss" or name.endswith(("/summary", "/spatial")):
                assert shared_record[name] == pytest.approx(value, abs=1e-5), name
        assert shared_record["broken"] == alone["broken"] > 0
        assert shared_record["samples"] == alone["samples"]
    weights = [checkpoint.load(tmp_path / out / "ckpt.pt").tensors for out in ("one", "two")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name


NORMED = ("efficientnetv2_s", "resnetv2_101", "regnety_064", "efficientvit_l1", "maxvit_base_tf_224")


@pytest.mark.parametrize("name", [name for name in TABLE_6 if name not in NORMED])
def test_the_other_networks_of_the_table_have_no_norms_to_synchronise(name: str) -> None:
    with torch.device("meta"):
        student = students[f"timm:{name}"](TimmOptions())
    assert isinstance(student, torch.nn.Module)
    assert not any(isinstance(module, _BatchNorm) for module in student.modules())


@pytest.mark.parametrize("name", [*NORMED[:-1], pytest.param(NORMED[-1], marks=pytest.mark.slow)])
def test_synchronised_norms_are_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    student = students[f"timm:{name}"](TimmOptions(image_size=64 if name.startswith("maxvit") else None))
    assert isinstance(student, torch.nn.Module)
    for norm in (module for module in student.modules() if isinstance(module, _BatchNorm)):
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)  # so that an activation makes a difference
    side = student.native_size[0] if student.fixed_size else 64
    images = torch.rand(1, 3, side, side)
    plain = sum(isinstance(module, _BatchNorm) for module in student.modules())
    with torch.inference_mode():
        before = student.eval()(images)
        synchronise_norms(student, Peers((0, 1), 2, None, (0,)))
        after = student(images)
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in student.modules()) == plain
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.summary, after.summary)


def test_norms_take_their_statistics_over_the_group_and_no_further() -> None:
    def convert(ranks: tuple[int, ...], group: object) -> torch.nn.Module:
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        synchronise_norms(network, Peers(ranks, 2, group, (0,)))  # type: ignore[arg-type]
        return network[1]

    group = object()
    shared = convert((2, 3), group)
    assert isinstance(shared, torch.nn.SyncBatchNorm)
    assert shared.process_group is group
    assert type(convert((1,), None)) is torch.nn.BatchNorm2d  # alone with its teachers: its own batch


def test_what_fsdp_cannot_shard_is_refused_before_anything_is_loaded(
    config: TrainConfig, start: Start
) -> None:
    scalars = replace(config, student="timm:dm_nfnet_f0", resolution=32, parallel="fsdp")
    with pytest.raises(ConfigError, match=r"its weight \S+gain is a single number; take --parallel ddp"):
        check_settings(scalars, 2)
    check_settings(replace(config, parallel="fsdp"), 2)
    check_settings(replace(scalars, parallel="ddp"), 2)
    with pytest.raises(ConfigError, match="this process was started alone; start it with torchrun"):
        start(config, parallel="fsdp")


PARTITIONED = (
    TEACHERS[0],
    replace(TEACHERS[1], summary_weight=0.5, spatial_weight=2.0),
    replace(TEACHERS[2], student_resolution=72, batch_size=8),
)


def begin(config: TrainConfig, group: Ranks, **changes: Any) -> Trainer:
    return Trainer(replace(config, **changes), group, CPU, Console(quiet=True))


def gradients(run: Trainer) -> tuple[dict[str, Tensor], float]:
    """Every gradient of the first step that this rank has, whole, and their norm."""
    _, _, norm = run.compute_gradients(next(run.batches()))
    found = {}
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = whole.clone()
    return found, float(norm)


def order_of(config: TrainConfig, names: Sequence[str]) -> int:
    """The seed of a group's order of the only source there is."""
    return seed_of(seed_of(config.seed, "group", int("sam" in names)), "source", 0)


def gradients_by_hand(config: TrainConfig) -> dict[str, Tensor]:
    """Those of the declared weighted sum, over each group's images in one forward."""
    teachers = load_teachers(config, CPU)
    sizes = teacher_sizes(config, teachers)
    model = build(model_config(config, teachers), config.seed)
    position_crops = model.sample_crops(24, generator(config.seed, "positions", 0))
    assert position_crops is not None
    loss, dataset = torch.zeros(()), open_images(config.data)
    for names, rows, side, crop in (
        (("clip", "dense"), range(16), 48, 64),
        (("sam",), range(16, 24), 72, 108),
    ):
        order = order_of(config, names)
        stored = [dataset.load(shuffled_index(lane, len(dataset), order)) for lane in range(len(rows))]
        crops = [
            random_view(image, config.data, crop, config.seed, row)
            for image, row in zip(stored, rows, strict=True)
        ]
        images = torch.stack(crops).float() / 255
        view = model(resize_images(images, (side, side)), position_crops[list(rows)])
        for name in names:
            target = teachers[name](resize_images(images, sizes[name][side]))
            parts = teacher_losses(model.adapt(name, view, target.grid), target, config.loss)
            weights = next(t for t in config.teachers if t.name == name)
            loss = loss + weights.summary_weight * parts.summary.mean()
            loss = loss + weights.spatial_weight * parts.spatial.mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: tuple[dict[str, Tensor], float], wanted: dict[str, Tensor]) -> None:
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, wanted[name], rtol=0, atol=1e-6), name
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert found[1] == pytest.approx(float(norm), rel=1e-5)


def test_the_gradients_of_groups_on_ranks_are_those_of_the_weighted_sum(
    config: TrainConfig, tmp_path: Path
) -> None:
    shared = replace(config, teachers=PARTITIONED, batch_size=16)
    wanted = gradients_by_hand(shared)
    ways: list[dict[str, Any]] = [
        {"ranks_per_group": (2, 2)},
        {"ranks_per_group": (2, 2), "grad_accum_steps": 2},
        {"ranks_per_group": (2, 2), "parallel": "fsdp"},
        {"teacher_placement": "shared"},
        {"teacher_placement": "shared", "parallel": "fsdp"},
    ]
    found = on_ranks(
        4, tmp_path / "ranks", lambda group: [gradients(begin(shared, group, **way)) for way in ways]
    )
    shares = [[set(grads) for grads, _ in rank] for rank in found]
    for rank, adaptors in enumerate((("clip", "dense"), ("clip", "dense"), ("sam",), ("sam",))):
        mine = {name for name in wanted if not name.startswith("adaptors.") or name.split(".")[1] in adaptors}
        assert shares[rank] == [mine, mine, mine, set(wanted), set(wanted)]
    for rank in found:
        for way in rank:
            check_gradients(way, wanted)
    check_gradients(gradients(begin(shared, Ranks())), wanted)
    check_gradients(gradients(begin(shared, Ranks(), grad_accum_steps=4)), wanted)


def trained(config: TrainConfig, group: Ranks, out: Path, **changes: Any) -> None:
    begin(config, group, out=out, **changes).train()


def check_alike(one: Path, other: Path, *, atol: float = 1e-5) -> None:
    """Whether two runs logged the same losses and ended with the same weights, to rounding."""
    records = [untimed(out) for out in (one, other)]
    assert len(records[0]) == len(records[1])
    for wanted, found in zip(*records, strict=True):
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            if name in ("loss", "grad_norm", "samples") or (
                "/" in name
                and not name.startswith("perf/images_per_rank/")
                and not name.endswith(("centred_cosine", "unexplained"))
            ):
                rel = 1e-5 if name == "grad_norm" else 0
                assert found[name] == pytest.approx(value, rel=rel, abs=atol), name
    for file in ("ckpt.pt", "ckpt-ema.pt"):
        weights = [checkpoint.load(out / file).tensors for out in (one, other)]
        assert list(weights[0]) == list(weights[1])
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor, weights[1][name], rtol=0, atol=atol), name


WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"ranks_per_group": (2, 2)},
    "fsdp": {"ranks_per_group": (2, 2), "parallel": "fsdp"},
    "turns": {"teacher_placement": "shared", "grad_accum_steps": 2},
    "recomputed": {
        "ranks_per_group": (2, 2),
        "parallel": "fsdp",
        "options": StudentOptions(activation_checkpointing=True),
    },
}


@pytest.fixture
def five(config: TrainConfig) -> TrainConfig:
    """Five steps of groups; at this rate AdamW does not blow the rounding of tiny gradients up."""
    return replace(
        config,
        teachers=PARTITIONED,
        batch_size=16,
        steps=5,
        ema=0.8,
        log_every=2,
        optim=replace(config.optim, lr=1e-4),
    )


@pytest.mark.parametrize(
    ("ways", "kind"),
    [
        (("ddp", "fsdp"), "adamw"),
        (("ddp", "fsdp"), "muon"),
        (("ddp", "fsdp"), "lamb"),
        pytest.param(("turns", "recomputed"), "adamw", marks=pytest.mark.slow),
    ],
)
def test_ddp_is_fsdp_is_one_process(
    five: TrainConfig, tmp_path: Path, ways: tuple[str, ...], kind: Literal["adamw", "muon", "lamb"]
) -> None:
    five = replace(five, optim=replace(five.optim, kind=kind))
    trained(five, Ranks(), tmp_path / "one")

    def work(group: Ranks) -> None:
        for way in ways:
            trained(five, group, tmp_path / way, **WAYS[way])

    on_ranks(4, tmp_path / "ranks", work)
    for way in ways:
        check_alike(tmp_path / "one", tmp_path / way)


def test_weights_are_sharded_and_rounded_only_for_forward_and_backward(
    five: TrainConfig, tmp_path: Path
) -> None:
    trained(five, Ranks(), tmp_path / "one")

    def work(group: Ranks) -> list[tuple[int, int, torch.dtype]]:
        run = begin(
            five, group, parallel="fsdp", teacher_placement="shared", precision="bf16", out=tmp_path / "two"
        )
        run.train()
        weights = [weight for weight in run.model.student.parameters() if isinstance(weight, DTensor)]  # type: ignore[attr-defined]
        return [(weight.to_local().numel(), weight.numel(), weight.dtype) for weight in weights]

    ranks = on_ranks(2, tmp_path / "ranks", work)
    number = len(list(begin(five, Ranks()).model.student.parameters()))  # type: ignore[attr-defined]
    assert [len(rank) for rank in ranks] == [number, number]
    whole = sum(size for _, size, _ in ranks[0])
    assert sum(own for rank in ranks for own, *_ in rank) == whole
    assert sum(own for own, *_ in ranks[0]) < 0.55 * whole
    assert {dtype for rank in ranks for *_, dtype in rank} == {torch.float32}
    losses = [[record["loss"] for record in read_records(tmp_path / out)] for out in ("one", "two")]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(
    "kind", ["adamw", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("muon", "lamb"))]
)
def test_another_world_and_engine_goes_on(
    five: TrainConfig, tmp_path: Path, kind: Literal["adamw", "muon", "lamb"]
) -> None:
    """Two steps on four ranks by DDP, two on two by FSDP2, the last alone."""
    five = replace(five, optim=replace(five.optim, kind=kind))
    trained(five, Ranks(), tmp_path / "one")
    out = tmp_path / "moved"

    def until(group: Ranks, step: int, **changes: Any) -> None:
        run = begin(five, group, out=out, **changes)
        genuine = run.train_step

        def stopping(batch: Batch) -> None:
            genuine(batch)
            run.stop._requested = run.step + 2 == step or group.world == 1

        run.train_step = stopping  # type: ignore[method-assign]
        run.train()
        assert (run.step, run.stopped) == (step, True)

    on_ranks(4, tmp_path / "four", lambda group: until(group, 2, ranks_per_group=(2, 2)))
    on_ranks(2, tmp_path / "two", lambda group: until(group, 4, parallel="fsdp", teacher_placement="shared"))
    trained(five, Ranks(), out)
    check_alike(tmp_path / "one", out)


@pytest.mark.slow
def test_two_ranks_share_a_cache_and_resume(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    cached = replace(config, cache=replace(config.cache, folder=tmp_path / "caches"), student="vitdet-tiny12")
    cached = replace(cached, resolution=96, windows=(2, 4), summary="mean", steps=6, save_every=3)
    start(cached, out=tmp_path / "one").train()
    write_yaml(replace(cached, out=tmp_path / "two"), tmp_path / "settings.yaml")
    done = torchrun(tmp_path / "settings.yaml")
    assert done.returncode == 0, done.stderr
    again = torchrun(tmp_path / "settings.yaml")
    assert again.returncode == 0, again.stderr
    losses = [[record["loss"] for record in read_records(tmp_path / out)] for out in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_process_alone_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(CPU) as group:
        assert group == Ranks(0, 1)
        assert group.leads
    assert not torch.distributed.is_initialized()

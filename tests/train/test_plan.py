"""Plans of runs: costs, memory and time against published counts, hand values and real processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from radio.config import write_yaml
from radio.errors import ConfigError
from radio.model import make_student
from radio.students import StudentOptions
from train.config import CacheConfig, DataConfig, NormaliseConfig, TeacherConfig, TrainConfig
from train.groups import idle_shares, make_partition, propose
from train.plan import Cost, PlanOptions, build_meta_models, bytes_of, count, make_plan, print_plan
from train.recipes import recipes
from train.reparametrise import linear_layers

CLIP = TeacherConfig(name="clip", model="tiny:clip")


def cost_of(config: TrainConfig, *, half: bool = False, standing: bool = False) -> Cost:
    group = make_partition(config, 1).groups[0]
    return count(config, build_meta_models(config), group, config.resolution, half=half, standing=standing)


def test_the_operations_of_a_step_by_hand(config: TrainConfig) -> None:
    chosen = replace(config, student="vit-b16", resolution=64, teachers=(CLIP,), batch_size=3)
    d, t, teacher = 768, 16 + 1, 25
    block = 2 * t * (3 * d * d + d * d + 2 * 4 * d * d) + 2 * 2 * t * t * d
    stem = 2 * 16 * d * 3 * 16 * 16
    heads = 2 * (d * d + 12 * d) + 2 * teacher * (d * d + 24 * d)  # the spatial one on the teacher's grid
    found = cost_of(chosen)
    assert found.forward_flops == 3 * (12 * block + stem + heads)
    assert found.teacher_flops == 3 * 2 * (25 * 24 * 3 * 10 * 10 + 24 * 12)
    # Twice the forward, but no gradient of the images, and attention's q k once more.
    assert found.backward_flops == 3 * (12 * (2 * block + 2 * t * t * d) + stem + 2 * heads)
    assert found.flops == found.teacher_flops + found.forward_flops + found.backward_flops
    # Images of 64 px for both, and the features of a 5 x 5 grid.
    assert found.inputs == 3 * 4 * (3 * 64 * 64 + 25 * 24 + 12)


def test_normalising_the_targets_is_counted(config: TrainConfig) -> None:
    chosen = replace(config, teachers=(CLIP,), batch_size=3)
    plain = cost_of(chosen)
    found = cost_of(replace(chosen, normalise=NormaliseConfig(kind="phi-s")))
    assert found.forward_flops - plain.forward_flops == 3 * 25 * 2 * 24 * 24  # tokens of 24 channels
    assert found.backward_flops == plain.backward_flops


def test_normalised_targets_of_a_shared_adaptor_are_counted(config: TrainConfig) -> None:
    """A further entry of twice the images costs twice as much, also where its losses are normalised."""
    high = replace(CLIP, name="clip-high", adaptor="clip", batch_size=6)
    chosen = replace(config, teachers=(CLIP, high), batch_size=3, normalise=NormaliseConfig(kind="phi-s"))
    models = build_meta_models(chosen)
    few, many = (
        count(chosen, models, group, chosen.resolution, half=False, standing=False)
        for group in make_partition(chosen, 1).groups
    )
    assert many.forward_flops == 2 * few.forward_flops
    assert (many.teacher_flops, many.backward_flops) == (2 * few.teacher_flops, 2 * few.backward_flops)


def test_memory_grows_with_the_images_and_gradients_with_the_weights(config: TrainConfig) -> None:
    few, many = (
        cost_of(replace(config, teachers=(CLIP,), batch_size=size), standing=True) for size in (8, 16)
    )
    assert many.activations == pytest.approx(2 * few.activations, rel=0.02)
    assert many.peak >= many.activations
    weights = bytes_of(build_meta_models(replace(config, teachers=(CLIP,))).model)
    small = replace(config, teachers=(CLIP,), batch_size=1)
    alone, standing = cost_of(small), cost_of(small, standing=True)
    assert alone.activations == standing.activations
    assert weights < alone.peak < weights + standing.peak


def test_what_makes_it_cheaper(config: TrainConfig) -> None:
    config = replace(config, teachers=(CLIP,), batch_size=16)
    plain = cost_of(config)
    parts = cost_of(replace(config, grad_accum_steps=4))
    assert (parts.flops, parts.inputs) == (plain.flops, plain.inputs)
    assert parts.activations == pytest.approx(plain.activations / 4, rel=0.05)
    saving = cost_of(replace(config, options=StudentOptions(activation_checkpointing=True)))
    assert saving.activations < 0.8 * plain.activations
    assert saving.backward_flops > 1.2 * plain.backward_flops
    half = cost_of(config, half=True)
    assert half.flops == plain.flops
    assert 0.5 * plain.activations < half.activations < 0.8 * plain.activations
    cached = cost_of(replace(config, cache=CacheConfig(folder=config.out)))
    assert (cached.teacher_flops, cached.teacher_working) == (0, 0)
    assert cached.forward_flops == plain.forward_flops


@pytest.mark.parametrize("kind", ["uncertainty", "adaloss"])
def test_balancers_can_be_counted(config: TrainConfig, kind: str) -> None:
    balanced = replace(config, balance=replace(config.balance, kind=kind))
    assert cost_of(balanced).forward_flops >= cost_of(config).forward_flops


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_noise_is_whole_on_every_rank(config: TrainConfig, parallel: Any) -> None:
    config = replace(config, teachers=(CLIP,), parallel=parallel)
    plain, noisy = (
        make_plan(replace(config, damp=damp), PlanOptions(world=2)).kinds[0].memory for damp in (0.0, 0.1)
    )
    layers = linear_layers(make_student(config.student, config.options))
    wanted = 4 * sum(layer.weight.numel() for layer in layers.values())
    assert (plain.noise, noisy.noise) == (0, wanted)
    assert noisy._replace(noise=0, peak=noisy.peak - wanted) == plain


ROOT = Path(__file__).parents[2]
CLIP = TeacherConfig(name="clip", model="tiny:clip")
SAM = TeacherConfig(name="sam", model="tiny:sam", batch_size=2, student_resolution=96)


@pytest.fixture
def two(config: TrainConfig) -> TrainConfig:
    """Two groups: four images at 48 px, two at 96."""
    return replace(config, teachers=(CLIP, SAM), peak_tflops=2.0)


def test_the_papers_plan() -> None:
    config = replace(recipes["paper-h14"](), peak_tflops=100.0)
    plan = make_plan(config, PlanOptions(utilisation=0.5, images=691_200_000))
    rows = [(g.name, len(g.ranks), g.share, *g.sides) for g in plan.partition.groups]
    assert rows == [("clip+dino", 32, 32, 224), ("sam", 32, 4, 1008)]
    assert (plan.partition.world, plan.partition.batch_size) == (64, 1152)
    assert plan.passes == 1
    clip, sam = (plan.costs[name] for name in ("clip+dino", "sam"))
    tokens = 257
    h14 = 32 * 2 * (12 * tokens * 1280**2 + 2 * tokens**2 * 1280)
    g14 = 40 * 2 * (tokens * 1536 * (4 * 1536 + 3 * 4096) + 2 * tokens**2 * 1536)
    assert clip.teacher_flops / 32 == pytest.approx(h14 + g14, rel=0.002)
    assert clip.forward_flops / 32 == pytest.approx(h14, rel=0.02)  # its windows cost less, its adaptors more
    assert sam.teacher_flops / 4 == pytest.approx(2 * 2976e9, rel=0.01)  # as published of SAM's ViT-H
    assert plan.flops == 32 * (clip.flops + sam.flops)
    assert plan.step_seconds == sam.flops / 50e12
    assert plan.days == pytest.approx(600_000 * sam.flops / 50e12 / 86400)
    assert idle_shares(plan.partition, plan.side_seconds) == {
        "clip+dino": pytest.approx(1 - clip.flops / sam.flops),
        "sam": 0,
    }
    assert propose(plan.partition, plan.side_seconds) is None
    teachers = [kind.memory.teachers for kind in plan.kinds]
    # two bytes a weight of CLIP's image tower, DINOv2 and SAM; norms and positions have four
    assert teachers[0] == pytest.approx(2 * (632_076_800 + 1_136_479_232), rel=0.005)
    assert teachers[1] == pytest.approx(2 * 637_026_048, rel=0.01)


def test_turns_add_up(two: TrainConfig) -> None:
    ranks = make_plan(two, PlanOptions(world=2, utilisation=1.0))
    alone = make_plan(two, PlanOptions(world=1, utilisation=1.0))
    assert len(ranks.kinds) == 2 and len(alone.kinds) == 1
    assert ranks.seconds == alone.seconds  # one rank each: the same work
    assert alone.step_seconds == pytest.approx(sum(ranks.seconds.values()))
    assert ranks.step_seconds == max(ranks.seconds.values())
    assert ranks.flops == alone.flops == pytest.approx(alone.step_seconds * 2e12)
    mine, both = [kind.memory for kind in ranks.kinds], alone.kinds[0].memory
    assert both.teachers == mine[0].teachers + mine[1].teachers
    assert both.activations == max(memory.activations for memory in mine)
    assert (both.exchange, mine[0].exchange > 0) == (0, True)


def test_sharded_weights(two: TrainConfig) -> None:
    two = replace(two, student="vit-b16")
    copies = make_plan(two, PlanOptions(world=6)).kinds[0].memory
    shards = make_plan(replace(two, parallel="fsdp"), PlanOptions(world=6)).kinds[0].memory
    assert copies.weights / 6 < shards.weights < copies.weights / 5  # the adaptor is whole on every rank
    assert shards.optimiser == 2 * shards.weights
    assert shards.exchange < copies.exchange
    assert shards.activations == copies.activations


def test_an_average_is_a_copy_of_the_weights(two: TrainConfig) -> None:
    plain, averaged = (make_plan(replace(two, ema=ema), PlanOptions()).kinds[0].memory for ema in (0.0, 0.9))
    assert averaged.peak - plain.peak == averaged.average == plain.weights


def test_measured_times_and_the_split_they_ask_for(two: TrainConfig, tmp_path: Path) -> None:
    teachers = (replace(CLIP, batch_size=8), replace(SAM, batch_size=8))
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        json.dumps(
            {
                "step": 1,
                "perf/step_time/clip": 8.0,
                "perf/images_per_rank/clip": 8,
                "perf/step_time/sam": 1.0,
                "perf/images_per_rank/sam": 8,
            }
        )
    )
    plan = make_plan(replace(two, teachers=teachers), PlanOptions(world=6, measured=log))
    assert [len(group.ranks) for group in plan.partition.groups] == [2, 4]  # by pixels
    assert plan.seconds == {"clip": 4.0, "sam": 0.25}
    proposal = propose(plan.partition, plan.side_seconds)
    assert proposal is not None
    assert (proposal.split, proposal.after) == ((4, 2), 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PlanOptions(world=0), "--world: 0 is out of bounds"),
        (PlanOptions(world=7), "7 ranks cannot be shared"),
        (PlanOptions(utilisation=1.5), "--utilisation: 1.5 is out of bounds"),
        (PlanOptions(images=0), "--images: 0 is out of bounds"),
    ],
)
def test_plans_that_cannot_be(two: TrainConfig, options: PlanOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(two, options)


def grown(config: TrainConfig, path: Path) -> int:
    """Bytes that a process of its own grew by at most while it ran this."""
    write_yaml(config, path)
    # Whatever is freed goes back at once, so that the resident set is what is held.
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.memory_probe", str(path)]
    environment = {**os.environ, **trimmed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    return int(done.stdout)


MEASURED = {
    "weights": {"student": "vit-b16", "resolution": 64, "batch_size": 2, "steps": 2},
    "activations": {"batch_size": 32},
    "recomputed": {"batch_size": 96, "options": StudentOptions(activation_checkpointing=True)},
    "groups": {"batch_size": 32, "teachers": (CLIP, replace(SAM, batch_size=16, student_resolution=240))},
    "parts": {"batch_size": 128, "grad_accum_steps": 4},
}
SLOW = ("weights", "recomputed", "groups", "parts")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MEASURED]
)
def test_memory_is_what_the_process_takes(config: TrainConfig, tmp_path: Path, name: str) -> None:
    base = replace(config, teachers=(CLIP,), resolution=168, steps=1, data=DataConfig(scenes=500, workers=0))
    chosen = replace(base, **MEASURED[name])  # type: ignore[arg-type]
    planned = make_plan(chosen, PlanOptions(world=1)).kinds[0].memory.peak
    assert planned == pytest.approx(grown(chosen, tmp_path / "config.yaml"), rel=0.15)


def printed(config: TrainConfig, options: PlanOptions) -> list[str]:
    out = io.StringIO()
    print_plan(make_plan(config, options), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines if line.startswith("|"))
    return [" ".join(line.replace("|", " ").split()) for line in lines]


def test_every_group_has_a_column(config: TrainConfig) -> None:
    teachers = (
        TeacherConfig(name="clip", model="tiny:clip"),
        TeacherConfig(name="dense", model="tiny:dense", resolution=96),
        TeacherConfig(name="sam", model="tiny:sam", student_resolution=96, batch_size=2),
    )
    chosen = replace(config, teachers=teachers, batch_size=16, steps=100_000, peak_tflops=0.01, device="cpu")
    lines = printed(chosen, PlanOptions(world=3, utilisation=0.5, images=1_000_000))
    assert lines[0] == "test: vit-tiny12 on 3 ranks, ddp"
    assert "teachers clip+dense sam all" in lines
    assert "their pixels 50 96 108" in lines
    assert "ranks 2 1 3" in lines or "ranks 1 2 3" in lines
    assert "images a step 16 2 18" in lines
    assert any(line.startswith("MB on a rank, activations") for line in lines)
    assert not any("average" in line for line in lines)  # there is none
    assert "data: 1800000 images, 1.8 passes" in lines
    text = " ".join(lines)
    assert "at 50% of 0.01 TFLOP/s (--peak-tflops)" in text
    assert "products in float32" in text
    assert "100000 steps in" in text


def test_a_process_alone_takes_turns(config: TrainConfig) -> None:
    teachers = (
        TeacherConfig(name="clip", model="tiny:clip"),
        TeacherConfig(name="sam", model="tiny:sam", batch_size=2),
    )
    lines = printed(replace(config, teachers=teachers, ema=0.9), PlanOptions(world=1))
    assert lines[0] == "test: vit-tiny12 on 1 rank, the groups in turn, ddp"
    assert "idle 0% 0% 0%" in lines
    assert any(line.startswith("MB on a rank, average") for line in lines)
    assert any(line.startswith("data: 72 images; give --images") for line in lines)
    assert "an A100's; give --peak-tflops" in " ".join(lines)

"""The paper's split, costs and days, and memory as the process itself shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from radio.config import write_yaml
from radio.errors import ConfigError
from radio.students import StudentOptions
from train.config import DataConfig, TeacherConfig, TrainConfig
from train.plan import PlanOptions, make_plan
from train.recipes import recipes

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
    rows = [(g.name, len(g.ranks), g.share, g.side) for g in plan.partition.groups]
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
    assert plan.idle_shares == {"clip+dino": pytest.approx(1 - clip.flops / sam.flops), "sam": 0}
    assert plan.proposal is None
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
    assert plan.proposal is not None
    assert (plan.proposal.split, plan.proposal.after) == ((4, 2), 2.0)


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

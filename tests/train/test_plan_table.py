"""What a plan prints."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from train.config import TeacherConfig, TrainConfig
from train.plan import PlanOptions, make_plan
from train.plan_table import print_plan


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

"""Runs on the generated world with the shipped teachers; they take minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config import DataConfig, OptimConfig, TeacherConfig, TrainConfig
from . import recipes

TEACHERS = (
    TeacherConfig(name="clip", model="scenes:clip"),
    TeacherConfig(name="dense", model="scenes:dense"),
    # on SAM's grid of 14 x 14, where an image costs the student three times as much: fewer images
    TeacherConfig(name="sam", model="scenes:sam", student_resolution=168, batch_size=4, summary_weight=0.0),
)


@recipes.register("demo")
def demo() -> TrainConfig:
    """Train a tiny ViT from three tiny teachers and print all scores on five tasks in one table."""
    return TrainConfig(
        recipe="demo",
        out=Path("runs/demo"),
        student="vit-tiny12",
        teachers=TEACHERS,
        resolution=96,
        steps=1600,
        batch_size=16,  # for small students steps count: twice the batch needs 1.6 times the images
        data=DataConfig(scenes=200_000, crop_scale=(0.7, 1.0), workers=1),
        optim=OptimConfig(lr=1.5e-3, betas=(0.9, 0.98), warmup=0.05),
        log_every=50,
        save_every=400,
        score=("knn", "zeroshot", "seg", "sam", "vqa"),
    )


@recipes.register("smoke")
def smoke() -> TrainConfig:
    """Run ten steps of the demo to check that everything is in place."""
    short = demo()
    return replace(
        short,
        recipe="smoke",
        out=Path("runs/smoke"),
        steps=10,
        batch_size=8,
        log_every=5,
        save_every=5,
        score=(),
    )


@recipes.register("scenes-long")
def scenes_long() -> TrainConfig:
    """Train the demo's student until it matches its teachers: up to an hour on two cores."""
    return replace(demo(), recipe="scenes-long", out=Path("runs/scenes-long"), steps=4000, save_every=1000)

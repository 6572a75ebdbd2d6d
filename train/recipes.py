"""Recipes: functions that return the settings of one run. The command line names one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from radio.registry import Registry
from radio.students import ViTDetOptions, ViTOptions

from .config import CacheConfig, DataConfig, OptimConfig, TeacherConfig, TrainConfig

recipes: Registry[Callable[[], TrainConfig]] = Registry("recipe")

# Teachers that the package contains.
SCENES_TEACHERS = (
    TeacherConfig(name="clip", model="scenes:clip"),
    TeacherConfig(name="dense", model="scenes:dense"),
    # on SAM's grid of 14 x 14, where an image costs the student three times as much: fewer images
    TeacherConfig(name="sam", model="scenes:sam", student_resolution=168, batch_size=4, summary_weight=0.0),
)

# The paper's teachers and data; the user provides the files.
CLIP = TeacherConfig(name="clip", model="openclip:ViT-H-14-quickgelu@weights/metaclip_h14.pt", resolution=224)
DINO = TeacherConfig(name="dino", model="dinov2:vitg14@weights/dinov2_vitg14_pretrain.pth", resolution=224)
SAM = TeacherConfig(
    name="sam",
    model="sam:vit_h@weights/sam_vit_h_4b8939.pth",
    resolution=1024,
    student_resolution=1008,
    batch_size=128,  # 32 ranks x 4 images; the other two have 32 ranks x 32
    summary_weight=0.0,
)
SHARDS = ("data/datacomp/{00000000..00012895}.tar",)


@recipes.register("paper-h14")
def paper_h14() -> TrainConfig:
    """Train the best student: ViT-H/14 with ViTDet windows from MetaCLIP H, DINOv2 g and SAM H (paper §4)."""
    return TrainConfig(
        recipe="paper-h14",
        out=Path("runs/paper-h14"),
        student="vitdet-h14",
        options=ViTDetOptions(),
        teachers=(CLIP, DINO, SAM),
        resolution=224,
        steps=600_000,
        batch_size=1024,
        data=DataConfig(shards=SHARDS, workers=8),
        save_every=2000,
        log_every=100,
    )


@recipes.register("paper-b14")
def paper_b14() -> TrainConfig:
    """Train table 3's student: ViT-B/14 from CLIP and DINOv2 at 224 px with naive balancing."""
    return replace(
        paper_h14(),
        recipe="paper-b14",
        out=Path("runs/paper-b14"),
        student="vit-b14",
        options=ViTOptions(),
        teachers=(CLIP, DINO),
    )


@recipes.register("real-small")
def real_small() -> TrainConfig:
    """Train a small ViT from EfficientNet-Lite0 and a DINOv2-architecture ViT-S/14 (`make weights`).

    For photographs and two CPU cores. The teachers dominate the cost on a CPU, so their features of fixed
    crops are computed once.
    """
    return TrainConfig(
        recipe="real-small",
        out=Path("runs/real-small"),
        student="vit-tiny16",
        options=ViTOptions(),
        teachers=(
            TeacherConfig(name="effnet", model="pip:efficientnet-lite0", resolution=160),
            TeacherConfig(name="dino", model="pip:dinov2-arch-vits14", resolution=112),
        ),
        resolution=160,
        steps=1200,
        batch_size=64,
        data=DataConfig(crop_scale=(0.3, 1.0), workers=1),
        optim=OptimConfig(lr=1e-3, warmup=0.05),
        cache=CacheConfig(folder=Path("runs/teacher-cache"), crops=3, confirm=False),
        log_every=50,
        save_every=300,
    )


@recipes.register("demo")
def demo() -> TrainConfig:
    """Train a tiny ViT from three tiny teachers and print all scores on five tasks in one table."""
    return TrainConfig(
        recipe="demo",
        out=Path("runs/demo"),
        student="vit-tiny12",
        options=ViTOptions(),
        teachers=SCENES_TEACHERS,
        resolution=96,
        steps=320,
        batch_size=24,
        data=DataConfig(scenes=200_000, crop_scale=(0.7, 1.0), workers=1),
        optim=OptimConfig(kind="muon", lr=8e-3, betas=(0.9, 0.98), warmup=0.02, schedule="linear"),
        log_every=20,
        save_every=160,
        eval_every=200,
        score=("knn", "zeroshot", "seg", "sam", "vqa"),
    )


@recipes.register("smoke")
def smoke() -> TrainConfig:
    """Run ten steps of the demo to check that everything is in place."""
    return replace(
        demo(),
        recipe="smoke",
        out=Path("runs/smoke"),
        steps=10,
        batch_size=8,
        log_every=5,
        save_every=5,
        eval_every=0,
        score=(),
    )


@recipes.register("scenes-long")
def scenes_long() -> TrainConfig:
    """Train the demo's student until it matches its teachers: eight minutes on two cores."""
    return replace(
        demo(), recipe="scenes-long", out=Path("runs/scenes-long"), steps=1200, save_every=400, eval_every=400
    )

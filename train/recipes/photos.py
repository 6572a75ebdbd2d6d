"""Runs on real photographs with real teachers installed by pip, on two CPU cores."""

from __future__ import annotations

from pathlib import Path

from ..config import CacheConfig, DataConfig, OptimConfig, TeacherConfig, TrainConfig
from . import recipes


@recipes.register("real-small")
def real_small() -> TrainConfig:
    """Train a small ViT from EfficientNet-Lite0 and a DINOv2-architecture ViT-S/14 (`make weights`).

    The teachers dominate the cost on a CPU, so their features of fixed crops are computed once.
    """
    return TrainConfig(
        recipe="real-small",
        out=Path("runs/real-small"),
        student="vit-tiny16",
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

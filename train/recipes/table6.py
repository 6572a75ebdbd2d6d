"""The paper's table 6, efficient backbones under one recipe: in small, and as the paper has it."""

from __future__ import annotations

from pathlib import Path

from ..comparison import ALL
from ..config import DataConfig, OptimConfig, TeacherConfig, TrainConfig
from . import recipes
from .paper import DINO
from .scenes import TEACHERS

OPENCLIP = TeacherConfig(
    name="clip", model="openclip:ViT-H-14@weights/open_clip_vit_h14_laion2b_s32b_b79k.bin", resolution=224
)


@recipes.register("table6")
def table6() -> TrainConfig:
    """Table 6 in small on the generated world: --student NAME, or all of them one after the other."""
    return TrainConfig(
        recipe="table6",
        out=Path("runs/table6/{student}"),
        student=ALL,
        teachers=TEACHERS[:2],  # a CLIP and a DINOv2 in small; the paper takes no SAM here
        resolution=96,
        steps=400,
        batch_size=16,
        data=DataConfig(scenes=200_000, crop_scale=(0.7, 1.0), workers=1),
        optim=OptimConfig(lr=1e-3, warmup=0.05),
        log_every=20,
        save_every=100,
        score=("knn", "zeroshot"),
    )


@recipes.register("table6-paper")
def table6_paper() -> TrainConfig:
    """Table 6 as the paper has it: OpenCLIP H/14 and DINOv2 g/14, ImageNet-21k, batch 4096 (§5.1)."""
    return TrainConfig(
        recipe="table6-paper",
        out=Path("runs/table6-paper/{student}"),
        student=ALL,
        teachers=(OPENCLIP, DINO),
        resolution=224,
        steps=600_000,
        batch_size=4096,
        data=DataConfig(shards=("data/imagenet21k/{0000..2047}.tar",), workers=8),
        save_every=2000,
        log_every=100,
    )

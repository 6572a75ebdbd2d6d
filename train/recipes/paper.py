"""The paper's runs; the user provides the files with the teachers' weights."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig, TeacherConfig, TrainConfig
from . import recipes

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
    return TrainConfig(
        recipe="paper-b14",
        out=Path("runs/paper-b14"),
        student="vit-b14",
        teachers=(CLIP, DINO),
        resolution=224,
        steps=600_000,
        batch_size=1024,
        data=DataConfig(shards=SHARDS, workers=8),
        save_every=2000,
        log_every=100,
    )

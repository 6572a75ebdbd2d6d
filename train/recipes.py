"""Recipes: functions that return the settings of one run. The command line names one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from radio.registry import Registry
from radio.students import ViTDetOptions, ViTOptions

from .config import (
    CacheConfig,
    DataConfig,
    LossConfig,
    NormaliseConfig,
    OptimConfig,
    SidesConfig,
    StageConfig,
    TeacherConfig,
    TrainConfig,
)

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


# Teachers of the models after RADIOv1. At 432 px the student has as many tokens as CLIP at 378 px, 27 x 27;
# DINOv2 sees as many as the student at every side up to its own.
_DFN = TeacherConfig(name="clip", model="openclip:ViT-H-14-378-quickgelu/dfn5b@weights/dfn5b_h14_378.pt")
_SIGLIP = TeacherConfig(name="siglip", model="openclip:ViT-SO400M-14-SigLIP-384@weights/siglip_so400m_384.pt")
_DINO_REG = TeacherConfig(
    name="dino",
    model="dinov2:vitg14_reg@weights/dinov2_vitg14_reg4_pretrain.pth",
    same_grid=True,
    resolution=518,  # the side that it was trained for last
)
_SAM_TILES = TeacherConfig(
    name="sam", model="sam:vit_h@weights/sam_vit_h_4b8939.pth", summary_weight=0.0, mosaic=True
)
_V25_TEACHERS = (_DFN, _SIGLIP, _DINO_REG, _SAM_TILES)


_SAM_SIDE = 1024  # pixels of its input


def at_high(
    teachers: Sequence[TeacherConfig], sides: SidesConfig, batch_size: int
) -> tuple[TeacherConfig, ...]:
    """Return further entries of teachers in a group of large images, which train the same adaptors."""
    return tuple(
        replace(
            teacher,
            name=f"{teacher.name}-high",
            adaptor=teacher.name,
            student_resolutions=sides,
            batch_size=batch_size,
            mosaic=teacher.mosaic and 2 * min(sides.sides) <= _SAM_SIDE,
        )
        for teacher in teachers
    )


def _radio_v25(size: str, student: str, init: str | None) -> TrainConfig:
    """Return the recipe of a RADIOv2.5: three stages, the last with small and large images in every step.

    From the PHI-S paper (arXiv 2410.01680) and the RADIOv2.5 report: stages, sides, batches, teachers, PHI-S,
    LAMB, the frozen trunk, spectral weights, tokens. Ours: the grid rule of DINOv2; one group for each size,
    of equal weights; PHI-S of large images by the statistics of the small ones; the summaries' cosine loss;
    warm-up, betas, clipping, crops; no text.
    """
    high = at_high(_V25_TEACHERS, SidesConfig(sides=(1024,)), 128)
    return TrainConfig(
        recipe=f"radio-v2.5-{size}",
        out=Path(f"runs/radio-v2.5-{size}"),
        student=student,
        options=ViTOptions(registers=4),
        summary="per-teacher",
        init=init,
        teachers=_V25_TEACHERS,
        resolution=256,
        steps=300_000,
        batch_size=1024,
        data=DataConfig(shards=SHARDS, workers=8),
        normalise=NormaliseConfig(kind="phi-s", steps=3000),
        freeze_trunk_steps=5000,
        optim=OptimConfig(kind="lamb", lr=1e-3, weight_decay=0.02),
        stages=(
            StageConfig(steps=300_000, resolution=432, freeze_trunk_steps=5000),
            StageConfig(steps=300_000, freeze_trunk_steps=5000, teachers=(*_V25_TEACHERS, *high)),
        ),
        spectral=True,
        save_every=2000,
        log_every=100,
    )


@recipes.register("radio-v2.5-b")
def radio_v25_b() -> TrainConfig:
    """Train a ViT-B/16 in the manner of RADIOv2.5-B, from timm's ViT-B/16."""
    return _radio_v25("b", "vit-b16", "timm:vit_base_patch16_224@weights/vit_base_patch16_224.safetensors")


@recipes.register("radio-v2.5-l")
def radio_v25_l() -> TrainConfig:
    """Train a ViT-L/16 in the manner of RADIOv2.5-L, from timm's ViT-L/16."""
    return _radio_v25("l", "vit-l16", "timm:vit_large_patch16_224@weights/vit_large_patch16_224.safetensors")


@recipes.register("radio-v2.5-h")
def radio_v25_h() -> TrainConfig:
    """Train a ViT-H/16 in the manner of RADIOv2.5-H; what it was started from is unknown."""
    return _radio_v25("h", "vit-h16", None)


_SIGLIP2 = TeacherConfig(name="siglip", model="openclip:ViT-gopt-16-SigLIP2-384@weights/siglip2_gopt_384.pt")
_DINOV3 = TeacherConfig(
    name="dino",
    model="timm:vit_7b_patch16_dinov3@weights/dinov3_vit7b16.safetensors",
    same_grid=True,
    resolution=1152,
)
_V4_TEACHERS = (_SIGLIP2, _DINOV3, _SAM_TILES)


def _c_radio_v4(size: str, student: str) -> TrainConfig:
    """Return the recipe of a C-RADIOv4: small and large images of many sides in every step.

    From its report (arXiv 2601.17237): sides, teachers, both losses and their weights of 1, shifts, MESA and
    its moving average, DAMP, spectral weights, tokens. Unknown, and ours: first weights (random), no frozen
    trunk, batches, steps, optimizer, crops, data, how often each side is drawn, equal weights of the groups
    of small and large images, MESA's weight and start, DAMP's deviation, which layers have spectral weights,
    PHI-S over 3,000 steps and of large images by the statistics of the small ones, a dispersion that is
    measured once. Other than theirs: SAM in the place of SAM 3, which needs a folder even for a plan; SigLIP
    2's own map in the place of the one sharpened by FeatSharp; heads of two layers.
    """
    high = at_high(_V4_TEACHERS, SidesConfig(sides=(512, 768, 1024, 1152)), 128)
    return TrainConfig(
        recipe=f"c-radio-v4-{size}",
        out=Path(f"runs/c-radio-v4-{size}"),
        student=student,
        options=ViTOptions(registers=7),
        summary="per-teacher",
        teachers=(*_V4_TEACHERS, *high),
        resolution=512,
        resolutions=SidesConfig(sides=(128, 192, 224, 256, 384, 432)),
        steps=300_000,
        batch_size=1024,
        data=DataConfig(shards=SHARDS, workers=8),
        loss=LossConfig(summary="angle", shift=0.5),
        normalise=NormaliseConfig(kind="phi-s", steps=3000),
        optim=OptimConfig(kind="lamb", lr=1e-3, weight_decay=0.02),
        ema=0.9996,
        mesa=1.0,
        spectral=True,
        damp=0.1,
        save_every=2000,
        log_every=100,
    )


@recipes.register("c-radio-v4-so400m")
def c_radio_v4_so400m() -> TrainConfig:
    """Train a SigLIP-shaped ViT/16 in the manner of C-RADIOv4-SO400M."""
    return _c_radio_v4("so400m", "vit-so400m16")


@recipes.register("c-radio-v4-h")
def c_radio_v4_h() -> TrainConfig:
    """Train a ViT-H/16 in the manner of C-RADIOv4-H."""
    return _c_radio_v4("h", "vit-h16")


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

"""The paper's table 6, efficient backbones under one recipe: a small version, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from evals.core.paper import TABLE_6_MODELS
from radio.students import students

from ..config import DataConfig, OptimConfig, TeacherConfig, TrainConfig
from ..tables import PaperTable, Rows, tables
from .paper import DINO
from .scenes import TEACHERS

ALL = "all"
"""Name that stands for all of `STUDENTS`."""

STUDENTS: tuple[str, ...] = tuple(
    name
    for name in TABLE_6_MODELS
    if not name.startswith(("dinov2:", "openclip:")) and name not in ("vit-l14", "vit-h14")
)
"""The paper's table 6 without its two large ViTs, which take hours on a CPU even in the small version."""

OPENCLIP = TeacherConfig(
    name="clip", model="openclip:ViT-H-14@weights/open_clip_vit_h14_laion2b_s32b_b79k.bin", resolution=224
)


@tables.register("table6")
def table6() -> PaperTable:
    """Reproduce a small table 6 on the generated world, for --student NAME or all students."""
    base = TrainConfig(
        recipe="table6",
        out=Path("runs/table6"),
        student=ALL,
        teachers=TEACHERS[:2],  # small counterparts of CLIP and DINOv2; the paper uses no SAM here
        resolution=96,
        steps=400,
        batch_size=16,
        data=DataConfig(scenes=200_000, crop_scale=(0.7, 1.0), workers=1),
        optim=OptimConfig(lr=1e-3, warmup=0.05),
        log_every=20,
        save_every=100,
        score=("knn", "zeroshot"),
    )
    return PaperTable(base=base, rows=_students, finish=_finish)


@tables.register("table6-paper")
def table6_paper() -> PaperTable:
    """Reproduce the paper's table 6: OpenCLIP H/14 and DINOv2 g/14, ImageNet-21k, batch 4096 (§5.1)."""
    base = TrainConfig(
        recipe="table6-paper",
        out=Path("runs/table6-paper"),
        student=ALL,
        teachers=(OPENCLIP, DINO),
        resolution=224,
        steps=600_000,
        batch_size=4096,
        data=DataConfig(shards=("data/imagenet21k/{0000..2047}.tar",), workers=8),
        save_every=2000,
        log_every=100,
    )
    return PaperTable(base=base, rows=_students, finish=_finish)


def _students(base: TrainConfig) -> Rows:
    """Return one run per student, each at the valid size nearest to the resolution."""
    names = STUDENTS if base.student == ALL else (base.student,)
    return {name: replace(base, student=name, resolution=_side(name, base)) for name in names}


def _side(name: str, base: TrainConfig) -> int:
    factory = students[name]
    if name.startswith("timm:"):  # built for the resolution
        return base.resolution
    with torch.device("meta"):
        return factory(base.options).nearest_size(base.resolution, base.resolution)[0]


def _finish(rows: Rows, checkpoints: Mapping[str, Path], out: Path, console: Console) -> None:
    """Print every student's scores and speed beside the paper's, if the run has tasks to score."""
    first = next(iter(rows.values()))
    if first.score:
        from ..table6_scores import compare  # imported late: it imports all evaluators

        compare(first, checkpoints, out / "reports", console)

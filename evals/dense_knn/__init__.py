"""Segmentation by the nearest patches of labelled images, without training: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals import seg_probe
from evals.core import evaluators
from evals.core.task import Evaluator, Machine, late
from evals.seg_probe.protocol import Scenes, SegSettings
from radio.config import CountOrZero, Pixels, Positive, check
from radio.datasets import DataSets

Memory = Annotated[int, Interval(ge=1, le=100_000_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseKnnSettings:
    """Labels of patches by the votes of their nearest neighbours among the patches of labelled images."""

    data: Path | None = None
    """A folder in the layout of ADE20K (its own 150 classes, or those of a classes.txt), VOC2012, Pascal
    Context or COCO-Stuff. Default: the generated world."""
    voc_split: Literal["train", "trainaug"] | None = None
    """Training split of VOC2012: the 1,464 images of VOC, or the 10,582 with SBD's. Where it is given, the
    model's name in the report ends in -voc. Default: trainaug where its list is there, else train."""
    scenes: tuple[Scenes, Scenes] = (1000, 300)
    """Number of generated training and validation images, used without --data."""
    size: Pixels | None = None
    """Side in pixels of the square that every image is stretched to, rounded to the nearest that the model
    takes. Default: 512 with --data, 96 for the generated world."""
    memory: Memory = 102_400
    """Number of training patches that are searched: the same number of every image, drawn by --seed from
    those with a labelled pixel. All of them, where they are fewer."""
    k: Annotated[int, Interval(ge=1, le=1024)] = 30
    """Number of neighbours that vote."""
    temperature: Positive = 0.02
    """A neighbour of similarity s votes exp(s / temperature), for each class by its share of the patch's
    pixels."""
    index: Literal["exact", "compressed"] = "exact"
    """How FAISS keeps the patches: `exact` compares with all, in float32; `compressed` with those in the
    nearest 64 lists of an inverted file, at 8 bits a number: a quarter of the memory, but no longer exact."""
    save_maps: Machine[CountOrZero] = 3
    """Number of validation images whose label maps and overlays are saved."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        check(self)


def data_sets(settings: DenseKnnSettings, sets: DataSets) -> Mapping[str, DenseKnnSettings]:
    """Score on the data sets of the segmentation probe."""
    placed = seg_probe.data_sets(SegSettings(data=settings.data, voc_split=settings.voc_split), sets)
    reports = {}
    for name, chosen in placed.items():
        own = replace(settings, data=chosen.data)
        split = None if chosen.voc_split is None else choose_voc_split(own) or "train"
        reports[name] = replace(own, voc_split=split)
    return reports


def choose_voc_split(settings: DenseKnnSettings) -> Literal["train", "trainaug"] | None:
    """Return the training split that is named, or trainaug where VOC2012's folder has its list, else None."""
    root = settings.data
    if settings.voc_split is not None or root is None or (root / "SegmentationClassContext").is_dir():
        return settings.voc_split
    folders = (root / home / "ImageSets" / "Segmentation" for home in ("", "VOC2012", "VOCdevkit/VOC2012"))
    lists = (folder / name for folder in folders for name in ("trainaug.txt", "aug.txt"))
    return "trainaug" if any(each.is_file() for each in lists) else None


@evaluators.register("dense-knn")
def make() -> Evaluator[DenseKnnSettings]:
    """Segmentation by the nearest patches of labelled images, without training."""
    return Evaluator(
        name="dense-knn",
        settings=DenseKnnSettings,
        evaluate=late("evals.dense_knn.evaluator:evaluate"),
        title="dense k-NN",
        input_size=late("evals.dense_knn.evaluator:input_size"),
        suffix=lambda settings: "" if settings.voc_split is None else "-voc",
        data_sets=data_sets,
    )

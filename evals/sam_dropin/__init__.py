"""SAM's decoder on a model's features, scored on COCO instances: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Machine, late
from radio.config import Count, CountOrZero, Pixels, check
from radio.datasets import DataSets
from radio.errors import ConfigError

SCENES_DETECTOR = Path("scenes")
"""Without data of one's own, the name of the generated scenes' detector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamSettings:
    """Masks that SAM's own decoder predicts from the model's features, scored on COCO instances."""

    data: Path | None = None
    """An instances JSON in COCO format; where its name begins with lvis, the model's name in the report ends
    in -lvis. Default: the generated world."""
    images: Path | None = None
    """The folder of the images."""
    scenes: Annotated[int, Interval(ge=1, le=1_000_000)] = 500
    """Number of generated scenes, used without --data."""
    sam_checkpoint: Path | None = None
    """A released SAM file (vit_b, vit_l or vit_h) whose neck, prompt encoder and mask decoder are used.
    Default: the one in the checkpoint's metadata."""
    teacher: str | None = None
    """The name of the teacher that is the SAM in the checkpoint's metadata. Default: the first SAM of this
    package, else another package's that brings a SAM, or its only one."""
    size: Pixels | None = None
    """Side of the model's input in pixels. Default: its resolution in training with SAM, else 1008 for a
    patch of 14 and 1024 for 16."""
    prompts: Literal["boxes", "points"] = "boxes"
    """How an object is prompted: with its ground-truth box, or with clicks."""
    clicks: Annotated[int, Interval(ge=1, le=100)] = 1
    """Points per object: the first inside it, each next one in the larger error region."""
    detections: Path | None = None
    """Use a detector's boxes (COCO results JSON) as prompts and score the masks as COCO AP; as LVIS AP where
    --data is a file of LVIS. Without --data only `scenes`: a detector with known faults on the generated
    scenes, scored as LVIS AP."""
    score_thresholds: tuple[float, ...] = ()
    """With --detections, also the AP of those boxes whose score is at least each of these."""
    protocol: Literal["paper", "efficientvit-2025"] = "paper"
    """paper: all annotations, plain union. efficientvit-2025: those of area 1 or more, union + 1e-7."""
    crowds: bool = True
    """Score crowd annotations too."""
    box_batch: Machine[Count | None] = None
    """Prompts per decoder batch. Default: what fits a CPU's caches; 64 on a GPU."""
    keep_embeddings: Machine[bool] = False
    """Cache the embeddings of all images, for later runs with other prompts."""
    save_masks: Machine[CountOrZero | None] = None
    """Number of panels to draw for each of the best, the median and the worst instances. Default: 3, and none
    with --detections."""

    def __post_init__(self) -> None:
        """Validate the settings; raise ConfigError for combinations that no data could satisfy."""
        check(self)
        if (self.data is None) != (self.images is None):
            raise ConfigError("--data JSON and --images FOLDER belong together; give both or neither")
        if self.clicks > 1 and self.prompts != "points":
            raise ConfigError(f"clicks = {self.clicks} goes with --prompts points; give that too")
        if self.detections is not None and self.prompts == "points":
            raise ConfigError("--detections takes a detector's boxes; leave --prompts points out")
        if self.data is None and self.detections not in (None, SCENES_DETECTOR):
            raise ConfigError(
                f"--detections {self.detections} needs --data, the instances on whose images they are; "
                f"without, give --detections {SCENES_DETECTOR}"
            )
        if self.score_thresholds and self.detections is None:
            raise ConfigError("--score-thresholds are of a detector's boxes; give --detections too")
        if len(set(self.score_thresholds)) < len(self.score_thresholds):
            raise ConfigError(f"--score-thresholds {self.score_thresholds}: give each score once")
        texts = [threshold_text(score) for score in self.score_thresholds]
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise ConfigError(
                f"--score-thresholds {self.score_thresholds}: two of them are {twice} to six digits, which "
                f"name them in the report; leave one out"
            )
        if self.detections is not None and self.save_masks:
            raise ConfigError("--save-masks compares with ground truth, which --detections does not look at")


def threshold_text(score: float) -> str:
    """Format a score threshold for the name of its metric."""
    return f"{score:g}"


def _suffix(settings: SamSettings) -> str:
    lvis = "-lvis" if settings.data is not None and settings.data.name.startswith("lvis") else ""
    if settings.detections is not None:
        return f"{lvis}-detections"
    return f"{lvis}-{settings.clicks}-clicks" if settings.prompts == "points" else lvis


def data_sets(settings: SamSettings, sets: DataSets) -> Mapping[str, SamSettings]:
    """Score the instances of COCO's val2017 and of LVIS, unless an instances JSON is named."""
    if settings.data is not None:
        return {OWN: settings}
    placed = {}
    if sets.coco is not None:
        instances = sets.coco / "annotations" / "instances_val2017.json"
        placed["coco"] = replace(settings, data=instances, images=sets.coco / "val2017")
    if sets.lvis is not None:
        placed["lvis"] = replace(settings, data=sets.lvis.annotations, images=sets.lvis.images)
    return placed


@evaluators.register("sam")
def make() -> Evaluator[SamSettings]:
    """Masks of SAM's own decoder on the model's features, scored on COCO instances."""
    return Evaluator(
        name="sam",
        settings=SamSettings,
        evaluate=late("evals.sam_dropin.evaluator:evaluate"),
        title="SAM drop-in",
        input_size=late("evals.sam_dropin.encoder:input_size"),
        missing_requirements=late("evals.sam_dropin.evaluator:missing_requirements"),
        suffix=_suffix,
        data_sets=data_sets,
    )

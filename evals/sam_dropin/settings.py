"""What can be chosen about a SAM drop-in evaluation. Every field is a flag of `radio-eval sam`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals.core.evaluator import Machine
from radio.config import Count, CountOrZero, Pixels, Seed, check
from radio.errors import ConfigError

Protocol = Literal["paper", "efficientvit-2025"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamSettings:
    """Masks that SAM's own decoder draws on the model's features, scored on COCO instances."""

    data: Path | None = None
    """An instances JSON in COCO's format. The generated world unless given."""
    images: Path | None = None
    """The folder of its pictures."""
    scenes: Annotated[int, Interval(ge=1, le=1_000_000)] = 500
    """Pictures of the generated world, where no data are given."""
    limit: Count | None = None
    """Use so many pictures, spread evenly."""
    sam_checkpoint: Path | None = None
    """A released SAM file (vit_b, vit_l or vit_h) whose neck, prompt encoder and mask decoder are used. The
    one on the checkpoint's card unless given."""
    teacher: str | None = None
    """Which of the student's teachers is the SAM, by its name on the checkpoint's card (default: the first
    scenes:sam or sam:…, else the only one of another package)."""
    size: Pixels | None = None
    """Side in pixels that the model sees. What it was trained at beside SAM, else 1008 for a patch of 14 and
    1024 for 16, unless given."""
    prompts: Literal["boxes", "points"] = "boxes"
    """What stands for an object: its ground-truth box, or clicks."""
    clicks: Annotated[int, Interval(ge=1, le=100)] = 1
    """Points an object: the first inside it, each next one in the larger error region."""
    boxes_from: Path | None = None
    """Take a detector's boxes instead (COCO results JSON) and score the masks as COCO AP."""
    protocol: Protocol = "paper"
    """paper: every annotation, plain union. efficientvit-2025: those of area 1 or more, union + 1e-7."""
    crowds: bool = True
    """Score crowd annotations too."""
    batch: Machine[Count] = 4
    """Pictures that go through the encoder together; also what a killed run loses at most."""
    box_batch: Machine[Count | None] = None
    """Prompts that go through the decoder together. As a CPU's caches hold, 64 on a GPU, unless given."""
    keep_embeddings: Machine[bool] = False
    """Keep the embeddings of all pictures in the cache, for more runs with other prompts."""
    save_masks: Machine[CountOrZero] = 0
    """Draw panels of so many of the best, the median and the worst instances each."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the encoder computes in; the decoder always computes in float32. On a GPU fp32 takes the encoder's
    products in TF32, unless NVIDIA_TF32_OVERRIDE=0 is set."""
    cache: Machine[Path | None] = None
    """Where finished pictures are kept. $XDG_CACHE_HOME/am-radio unless given."""
    seed: Seed = 0
    """Which generated world; also of the bootstrap and of untrained heads."""

    def __post_init__(self) -> None:
        """Refuse what no data could make sense of."""
        check(self)
        if (self.data is None) != (self.images is None):
            raise ConfigError("--data JSON and --images FOLDER belong together; give both or neither")
        if self.clicks > 1 and self.prompts != "points":
            raise ConfigError(f"clicks = {self.clicks} goes with --prompts points; give that too")
        if self.boxes_from is not None and (self.prompts == "points" or self.data is None):
            raise ConfigError("--boxes-from takes a detector's boxes on --data; leave --prompts points out")
        if self.boxes_from is not None and self.save_masks:
            raise ConfigError("--save-masks compares with ground truth, which --boxes-from does not look at")

    @property
    def smallest_area(self) -> float:
        """Annotations below this area are not scored."""
        return 1.0 if self.protocol == "efficientvit-2025" else 0.0

    @property
    def union_bias(self) -> float:
        """What is added to the union."""
        return 1e-7 if self.protocol == "efficientvit-2025" else 0.0

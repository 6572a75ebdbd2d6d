"""What can be chosen about a segmentation probe. Every field is a flag of `radio-eval seg`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals.core.evaluator import Machine
from radio.config import Count, CountOrZero, NotNegative, Pixels, Positive, Seed, Workers, check

Batch = Annotated[int, Interval(ge=1, le=65_536)]  # a step's pictures are in memory at once
Scenes = Annotated[int, Interval(ge=1, le=1_000_000)]  # each is written to disk
PresetName = Literal["paper", "released", "dinov2", "scenes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegSettings:
    """A linear map from frozen tokens to the class of every pixel."""

    data: Path | None = None
    """A folder in the layout of ADE20K (its own 150 classes, or those of a classes.txt) or of VOC2012. The
    generated world unless given."""
    voc_split: Literal["train", "trainaug"] = "train"
    """What a VOC2012 head learns from: the 1,464 pictures of VOC, or the 10,582 with SBD's."""
    preset: PresetName | None = None
    """The protocol. `paper` where data are given and `scenes` for the generated world, unless given."""
    crop: Pixels | None = None
    """Side of the squares that the backbone is shown, in pixels. The preset's, or the nearest that the
    backbone takes, unless given."""
    stride: Pixels | None = None
    """Pixels from one square to the next when testing. The preset's unless given."""
    iterations: Count | None = None
    """Steps of the head's training; the warm-up keeps its share. The preset's unless given."""
    batch: Batch | None = None
    """Pictures a step, over all ranks. The preset's unless given."""
    lr: Positive | None = None
    """AdamW's peak learning rate. The preset's unless given."""
    weight_decay: NotNegative | None = None
    """AdamW's. The preset's unless given."""
    seeds: Count = 1
    """Train so many heads; the scores are their mean, with the standard deviation."""
    seed: Seed = 0
    """Which generated world, and of the first head its weights, order and crops; the next heads count up."""
    head_seed: Machine[Seed | None] = None
    """Of the first head, where it is to be another than that of the world."""
    scenes: tuple[Scenes, Scenes] = (1000, 300)
    """Training and validation pictures of the generated world, where no data are given."""
    limit: Count | None = None
    """Use so many pictures of training and validation each, spread evenly."""
    save_maps: Machine[CountOrZero] = 0
    """Keep the label maps of so many validation pictures, and overlays beside the truth."""
    keep_tokens: Machine[bool] = True
    """Run the backbone once over all pictures where the preset shows each of them in one way only."""
    keep_tokens_gb: Machine[NotNegative] = 8.0
    """Do not do so where the tokens would take more than this."""
    save_every: Machine[Count] = 200
    """Steps after which the training is written down, so that a killed run goes on from there."""
    workers: Machine[Workers | None] = None
    """Loader processes; none on a CPU and up to 8 beside a GPU unless given."""
    cache: Machine[Path | None] = None
    """Where tokens, heads and generated pictures are kept. $XDG_CACHE_HOME/am-radio unless given."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the backbone computes in; the head is always trained in fp32. On a GPU fp32 takes the backbone's
    products in TF32, unless NVIDIA_TF32_OVERRIDE=0 is set."""

    @property
    def first_head(self) -> int:
        """The first head's seed."""
        return self.seed if self.head_seed is None else self.head_seed

    def __post_init__(self) -> None:
        """Refuse what no data could make sense of."""
        check(self)

"""Settings of a segmentation probe. Every field is a flag of `radio-eval seg`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals.core.evaluator import Machine
from radio.config import Count, CountOrZero, NotNegative, Pixels, Positive, Seed, Workers, check

Batch = Annotated[int, Interval(ge=1, le=65_536)]  # images of a step, in memory at once
Scenes = Annotated[int, Interval(ge=1, le=1_000_000)]  # written to disk
PresetName = Literal["paper", "released", "dinov2", "scenes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegSettings:
    """A linear map from frozen tokens to the class of every pixel."""

    data: Path | None = None
    """A folder in the layout of ADE20K (its own 150 classes, or those of a classes.txt) or of VOC2012.
    Default: the generated scenes."""
    voc_split: Literal["train", "trainaug"] = "train"
    """Training split of VOC2012: the 1,464 images of VOC, or the 10,582 with SBD's."""
    preset: PresetName | None = None
    """The protocol. Default: `paper` with --data, `scenes` for the generated scenes."""
    crop: Pixels | None = None
    """Side of the backbone's square input in pixels. Default: the preset's, or the nearest that the backbone
    takes."""
    stride: Pixels | None = None
    """Pixels from one crop to the next when testing. Default: the preset's."""
    iterations: Count | None = None
    """Training steps of the head; the warm-up scales in proportion. Default: the preset's."""
    batch: Batch | None = None
    """Images per step, over all ranks. Default: the preset's."""
    lr: Positive | None = None
    """AdamW's peak learning rate. Default: the preset's."""
    weight_decay: NotNegative | None = None
    """AdamW's weight decay. Default: the preset's."""
    seeds: Count = 1
    """Number of heads to train; the scores are their mean, with the standard deviation."""
    seed: Seed = 0
    """Seed of the generated scenes and of the first head's weights, order and crops; +1 per further head."""
    head_seed: Machine[Seed | None] = None
    """Seed of the first head. Default: --seed."""
    scenes: tuple[Scenes, Scenes] = (1000, 300)
    """Number of generated training and validation images, used without --data."""
    limit: Count | None = None
    """Maximum number of images in training and in validation, evenly spaced."""
    save_maps: Machine[CountOrZero] = 0
    """Number of validation images whose label maps and overlays are saved."""
    keep_tokens: Machine[bool] = True
    """Compute the tokens once and cache them, if the preset has no augmentation."""
    token_cache_gb: Machine[NotNegative] = 8.0
    """Do not cache tokens that would take more than this, in GB."""
    save_every: Machine[Count] = 200
    """Steps between saved states, from which an interrupted run resumes."""
    workers: Machine[Workers | None] = None
    """Loader processes. Default: 0 on a CPU and up to 8 with a GPU."""
    cache: Machine[Path | None] = None
    """Folder for tokens, heads and generated images. Default: $XDG_CACHE_HOME/am-radio."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the backbone; the head is always trained in fp32. On a GPU, fp32 uses TF32 for the
    backbone's matrix products, unless NVIDIA_TF32_OVERRIDE=0 is set."""

    @property
    def first_head(self) -> int:
        """Seed of the first head."""
        return self.seed if self.head_seed is None else self.head_seed

    def __post_init__(self) -> None:
        """Validate the settings; raise ConfigError for an invalid value."""
        check(self)

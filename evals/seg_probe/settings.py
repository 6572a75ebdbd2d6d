"""What can be chosen about a segmentation probe. Every field is a flag of `radio-eval seg`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evals.core.evaluator import Machine
from radio.errors import ConfigError

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
    crop: int | None = None
    """Side of the squares that the backbone is shown, in pixels. The preset's, or the nearest that the
    backbone takes, unless given."""
    stride: int | None = None
    """Pixels from one square to the next when testing. The preset's unless given."""
    iterations: int | None = None
    """Steps of the head's training; the warm-up keeps its share. The preset's unless given."""
    batch: int | None = None
    """Pictures a step, over all ranks. The preset's unless given."""
    lr: float | None = None
    """AdamW's peak learning rate. The preset's unless given."""
    weight_decay: float | None = None
    """AdamW's. The preset's unless given."""
    seeds: int = 1
    """Train so many heads; the scores are their mean, with the standard deviation."""
    seed: int = 0
    """Which generated world, and of the first head its weights, order and crops; the next heads count up."""
    head_seed: Machine[int | None] = None
    """Of the first head, where it is to be another than that of the world."""
    scenes: tuple[int, int] = (1000, 300)
    """Training and validation pictures of the generated world, where no data are given."""
    limit: int | None = None
    """Use so many pictures of training and validation each, spread evenly."""
    save_maps: Machine[int] = 0
    """Keep the label maps of so many validation pictures, and overlays beside the truth."""
    keep_tokens: Machine[bool] = True
    """Run the backbone once over all pictures where the preset shows each of them in one way only."""
    keep_tokens_gb: Machine[float] = 8.0
    """Do not do so where the tokens would take more than this."""
    save_every: Machine[int] = 200
    """Steps after which the training is written down, so that a killed run goes on from there."""
    workers: Machine[int | None] = None
    """Loader processes; none on a CPU and up to 8 beside a GPU unless given."""
    cache: Machine[Path | None] = None
    """Where tokens, heads and generated pictures are kept. $XDG_CACHE_HOME/am-radio unless given."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the backbone computes in; the head is always trained in fp32."""

    @property
    def first_head(self) -> int:
        """The first head's seed."""
        return self.seed if self.head_seed is None else self.head_seed

    def __post_init__(self) -> None:
        """Refuse what no data could make sense of."""
        at_least_one = ("crop", "stride", "iterations", "batch", "seeds", "limit", "save_every")
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: give 1 or more")
        if self.save_maps < 0:
            raise ConfigError(f"save_maps = {self.save_maps}: give 0 or more")
        if self.lr is not None and self.lr <= 0:
            raise ConfigError(f"lr = {self.lr}: give a learning rate above 0, such as 1e-3")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ConfigError(f"weight_decay = {self.weight_decay}: give 0 or more")
        if min(self.scenes) < 1:
            raise ConfigError(f"scenes = {self.scenes}: give at least one picture of each")

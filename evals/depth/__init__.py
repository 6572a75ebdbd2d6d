"""Depth from one image by a linear map on frozen tokens: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Compared, Evaluator, Machine, RunSettings, late
from radio.config import Count, CountOrZero, NotNegative, Pixels, Positive, Seed, check
from radio.datasets import DataSets

Batch = Annotated[int, Interval(ge=1, le=65_536)]  # images of a step, in memory at once
Scenes = Annotated[int, Interval(ge=1, le=100_000)]  # their tokens are in memory at once


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthSettings:
    """A linear map from frozen tokens to the depth of every pixel."""

    data: Path | None = None
    """A folder with NYU Depth V2 as it is shared for this task: nyu_train.txt and nyu_test.txt (image, depth
    and focal length a line), JPEGs, and 16-bit PNGs in millimetres. Default: the generated world."""
    layers: Compared[Count | None] = None
    """Number of the backbone's last blocks whose tokens the head reads side by side, each after the final
    norm. Where another than the data's default is given, the model's name in the report ends in it
    (`-1-layers`). Default: 4 with --data, or 1 for a backbone without so many blocks; 1 in the generated
    world."""
    size: Pixels | None = None
    """Short side in pixels of the encoder's input in training; whole images are larger in proportion.
    Default: 416 with --data, 96 for the generated world."""
    iterations: Count | None = None
    """Training steps of the head; the warm-up scales in proportion. Default: 38,400, or 300 for the generated
    scenes."""
    train_batch_size: Batch = 16
    """Images per training step, over all ranks."""
    lr: Positive | None = None
    """AdamW's peak learning rate. Default: 3e-4, or 3e-3 for the generated world."""
    weight_decay: NotNegative = 1e-4
    """AdamW's weight decay."""
    head_seed: Machine[Seed | None] = None
    """Seed of the head's weights, and of order and crops of the images. Default: --seed."""
    scenes: tuple[Scenes, Scenes] = (1000, 300)
    """Number of generated training and test images, used without --data."""
    num_shown: Machine[CountOrZero] = 4
    """Number of test images on the page, each with its depth and the prediction."""
    save_every: Machine[Count] = 200
    """Steps between saved states, from which an interrupted run resumes."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` for an invalid value."""
        check(self)


def data_sets(settings: DepthSettings, sets: DataSets) -> Mapping[str, DepthSettings]:
    """Probe on NYU Depth V2, unless data are named."""
    if settings.data is not None:
        return {OWN: settings}
    return {} if sets.nyu is None else {"nyu": replace(settings, data=sets.nyu)}


def suffix(settings: DepthSettings) -> str:
    """Return what another number of layers than the data's default adds to the model's name."""
    return "" if settings.layers in (None, default_layers(settings)) else f"-{settings.layers}-layers"


def default_layers(settings: DepthSettings) -> int:
    """Return the number of layers of the protocol: NYU's published one, and ours of the generated world."""
    return 1 if settings.data is None else 4


def with_seed(settings: DepthSettings, run: RunSettings, number: int) -> DepthSettings:
    """Return the settings of the `number`-th repetition, with another seed of the head."""
    first = run.seed if settings.head_seed is None else settings.head_seed
    return replace(settings, head_seed=first + number)


@evaluators.register("depth")
def make() -> Evaluator[DepthSettings]:
    """Depth of every pixel by a linear head on frozen tokens: RMSE, relative error and accuracies."""
    return Evaluator(
        name="depth",
        settings=DepthSettings,
        evaluate=late("evals.depth.evaluator:evaluate"),
        title="depth probe",
        suffix=suffix,
        input_size=late("evals.depth.evaluator:train_size"),
        with_seed=with_seed,
        data_sets=data_sets,
    )

"""The protocols by name, and their resolved values for a backbone and a data set."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from radio.errors import ConfigError
from radio.types import Backbone

from .conversations import Template
from .settings import PresetName, VqaSettings

Size = tuple[int, int]  # (height, width) in pixels
View = Literal["crop", "pad"]

_SMALL = 224  # a backbone with a smaller native size gets images of that size
_LEAST_BATCHES = 8  # per epoch
_NEAR = 1 / 8  # of the preset's side: a size that deviates more does not fit the encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A training stage of a protocol."""

    template: Template
    view: View  # short side resized and centre cropped, or padded with the mean colour
    learns: tuple[str, ...]  # "projector", "language"
    lr: float
    batch: int
    epochs: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.03  # of the steps; then a cosine to zero
    lr_of_opened: float | None = None  # for a pretrained language model; default: `lr`
    batch_of_opened: int | None = None  # for a pretrained language model; default: `batch`


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A protocol: stages, sizes and their defaults."""

    pretrain: Stage
    instruct: Stage
    sizes: tuple[int, ...]  # sides in pixels; the first that fits the encoder is used
    micro_batch: int
    new_tokens: int
    answer_batch: int
    longest: int = 2048  # tokens of a training sample
    layer_norm: bool = False
    language_model: str | None = None
    words: Stage | None = None  # text-only training of the tiny language model, before it sees images
    scenes: tuple[int, int] = (2000, 250)  # training images, and images of the benchmarks
    least_steps: int = 1  # of a stage; few records take more epochs
    blind: bool = False
    lora_lr: float = 2e-4  # LLaVA's, for LoRA instead of the whole language model


PRESETS: dict[PresetName, Preset] = {
    # LLaVA-1.5 (Liu et al. 2023, "Improved baselines with visual instruction tuning").
    "paper": Preset(
        pretrain=Stage(template="plain", view="crop", learns=("projector",), lr=1e-3, batch=256),
        instruct=Stage(template="v1", view="pad", learns=("projector", "language"), lr=2e-5, batch=128),
        sizes=(336, 224),
        micro_batch=16,
        new_tokens=128,
        answer_batch=16,
    ),
    # Minutes on two CPU cores: a language model of the world's words, and several questions per image.
    "scenes": Preset(
        words=Stage(
            template="plain", view="pad", learns=("language",), lr=3e-3, batch=32, epochs=2.0, warmup=0.1
        ),
        pretrain=Stage(
            template="plain",
            view="pad",
            learns=("projector",),
            lr=3e-3,
            batch=32,
            warmup=0.1,
            lr_of_opened=5e-3,
        ),
        instruct=Stage(
            template="v1",
            view="pad",
            learns=("projector", "language"),
            lr=2e-3,
            batch=16,  # many small steps: attention learns to find the object late, then quickly
            warmup=0.1,
            lr_of_opened=1e-4,
            batch_of_opened=4,
        ),
        sizes=(96,),
        micro_batch=16,
        new_tokens=4,
        answer_batch=64,
        layer_norm=True,
        language_model="tiny",
        least_steps=60,
        blind=True,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """A stage resolved with the settings, for one data set."""

    template: Template
    view: View
    learns: tuple[str, ...]
    lr: float
    weight_decay: float
    batch: int
    micro_batch: int
    steps: int
    warmup: int
    save_every: int

    def describe(self) -> dict[str, Any]:
        """Return the values that determine the outcome, as in the report: all but `save_every`."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


def choose(settings: VqaSettings) -> tuple[PresetName, Preset]:
    """Return name and preset that the settings name or imply."""
    name: PresetName = settings.preset or ("scenes" if settings.instruct_data is None else "paper")
    return name, PRESETS[name]


def language_name(settings: VqaSettings, name: PresetName) -> str:
    """Return the name of the language model.

    Raises:
        ConfigError: neither the preset nor the settings name one.
    """
    found = settings.language_model or PRESETS[name].language_model
    if found is None:
        raise ConfigError(
            f"the preset {name} needs a language model; give --language-model FOLDER (Vicuna-7B-v1.5), a "
            f".gguf file, smollm2 or tiny"
        )
    return found


def plan_stage(
    stage: Stage, preset: Preset, settings: VqaSettings, count: int, *, opened: bool = True
) -> StagePlan:
    """Resolve a stage for `count` records; few records still give eight batches per epoch.

    Args:
        opened: whether the language model is pretrained rather than made in the run.

    Raises:
        ConfigError: a batch that the micro-batch does not divide.
    """
    batch = settings.batch or min(
        (opened and stage.batch_of_opened) or stage.batch, max(1, count // _LEAST_BATCHES)
    )
    micro_batch = settings.micro_batch or math.gcd(batch, preset.micro_batch)
    if batch % micro_batch:
        raise ConfigError(f"a batch of {batch} is no multiple of micro_batch = {micro_batch}; choose another")
    steps = max(preset.least_steps, math.ceil(count * stage.epochs / batch))
    steps = min(steps, settings.max_steps or steps)
    lr = stage.lr if stage.lr_of_opened is None or not opened else stage.lr_of_opened
    if settings.lora_rank is not None and "language" in stage.learns:
        lr = preset.lora_lr
    return StagePlan(
        template=stage.template,
        view=stage.view,
        learns=stage.learns,
        lr=settings.lr or lr,
        weight_decay=stage.weight_decay,
        batch=batch,
        micro_batch=micro_batch,
        steps=steps,
        warmup=math.ceil(stage.warmup * steps),
        save_every=settings.save_every,
    )


def choose_size(model: Backbone, settings: VqaSettings, preset: Preset) -> tuple[Size, tuple[str, ...]]:
    """Choose the (height, width) that images are encoded at; also return notes where it deviates."""
    own = model.native_size
    if settings.size is not None:
        size = model.nearest_size(settings.size, settings.size)
        return size, _note(settings.size, size, model.name)
    if max(own) < _SMALL:
        return own, ()
    for side in preset.sizes:
        size = model.nearest_size(side, side)
        if max(abs(length - side) for length in size) <= side * _NEAR:
            return size, _note(side, size, model.name)
    size = model.nearest_size(preset.sizes[-1], preset.sizes[-1])
    return size, _note(preset.sizes[-1], size, model.name)


def _note(side: int, size: Size, name: str) -> tuple[str, ...]:
    if size == (side, side):
        return ()
    return (f"{side} px are wanted; {name} takes {size[0]}x{size[1]}, which was used",)

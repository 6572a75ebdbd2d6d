"""The protocols by name, and what one of them comes to for a backbone."""

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

_SMALL = 224  # a backbone made for less is shown pictures of its own size
_LEAST_BATCHES = 8  # an epoch
_NEAR = 1 / 8  # of the wanted side: a fit further away than this is not "where the encoder allows it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A training of a protocol."""

    template: Template
    view: View  # the short side to the size and the middle cut out, or padded with the mean colour
    learns: tuple[str, ...]  # "projector", "language"
    lr: float
    batch: int
    epochs: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.03  # of the steps; then a cosine to zero
    lr_of_opened: float | None = None  # where the language model is not made in the run; else `lr` too
    batch_of_opened: int | None = None  # likewise


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A protocol of the field."""

    pretrain: Stage
    instruct: Stage
    sizes: tuple[int, ...]  # sides in pixels, the first that fits the encoder
    micro_batch: int
    new_tokens: int
    answer_batch: int
    longest: int = 2048  # tokens of a training sample
    layer_norm: bool = False
    language_model: str | None = None
    words: Stage | None = None  # how the tiny language model learns to speak, before it sees anything
    scenes: tuple[int, int] = (2000, 250)  # training pictures, questions a benchmark
    least_steps: int = 1  # of a stage, through more epochs where there are few records
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
    # Minutes on two CPU cores: a language model of the world's own words, and several questions a picture.
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
            batch=16,  # many small steps: where attention finds the object is found late, then quickly
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
    """A stage with the settings' changes, for one data set."""

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
        """What the report says of it, and what decides the outcome; not how often it is written down."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


def choose(settings: VqaSettings) -> tuple[PresetName, Preset]:
    """The preset that the settings name or imply."""
    name: PresetName = settings.preset or ("scenes" if settings.instruct_data is None else "paper")
    return name, PRESETS[name]


def language_name(settings: VqaSettings, name: PresetName) -> str:
    """The language model.

    Raises:
        ConfigError: the preset has none of its own, and none was named.
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
    """What a stage comes to for `count` records; few of them are still cut into eight batches.

    Args:
        opened: whether the language model comes from elsewhere instead of being made in the run.

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
    """(height, width) that pictures are encoded at, and notes on what the backbone did not take."""
    own = model.native_size
    if settings.size is not None:
        size = model.fit(settings.size, settings.size)
        return size, _note(settings.size, size, model.name)
    if max(own) < _SMALL:
        return own, ()
    for side in preset.sizes:
        size = model.fit(side, side)
        if max(abs(length - side) for length in size) <= side * _NEAR:
            return size, _note(side, size, model.name)
    size = model.fit(preset.sizes[-1], preset.sizes[-1])
    return size, _note(preset.sizes[-1], size, model.name)


def _note(side: int, size: Size, name: str) -> tuple[str, ...]:
    if size == (side, side):
        return ()
    return (f"{side} px are wanted; {name} takes {size[0]}x{size[1]}, which was used",)

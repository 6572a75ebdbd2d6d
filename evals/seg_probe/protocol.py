"""Settings, published protocols, and the input sizes that they give a backbone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval

from evals.core.task import Machine
from radio.config import Count, CountOrZero, NotNegative, Pixels, Positive, Seed, check
from radio.errors import SizeError

if TYPE_CHECKING:
    from radio.types import Backbone

Batch = Annotated[int, Interval(ge=1, le=65_536)]  # images of a step, in memory at once
Scenes = Annotated[int, Interval(ge=1, le=1_000_000)]  # written to disk
Layout = Literal["ade20k", "voc", "context", "coco-stuff"]  # of a data set's folder
PresetName = Literal["paper", "released", "dinov2", "scenes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegSettings:
    """A linear map from frozen tokens to the class of every pixel."""

    data: Path | None = None
    """A folder in the layout of ADE20K (its own 150 classes, or those of a classes.txt), VOC2012, Pascal
    Context or COCO-Stuff. Default: the generated scenes."""
    voc_split: Literal["train", "trainaug"] | None = None
    """Training split of VOC2012: the 1,464 images of VOC, or the 10,582 with SBD's. Where it is given, the
    model's name in the report ends in -voc. Default: train."""
    preset: PresetName | None = None
    """The protocol. Default: `paper` with --data, `scenes` for the generated scenes."""
    crop: Pixels | None = None
    """Side of the backbone's square input in pixels. Default: the preset's; a student whose windows do not
    divide it gets global attention. A backbone that does not take it gets 224 (presets paper and released),
    else the nearest that it takes."""
    stride: Pixels | None = None
    """Pixels from one crop to the next when testing. Default: the preset's."""
    layers: Count = 1
    """Number of the backbone's last blocks whose tokens the head reads side by side, each after the final
    norm; 4 as in DINOv2's protocol with several layers."""
    iterations: Count | None = None
    """Training steps of the head; the warm-up scales in proportion. Default: the preset's."""
    train_batch_size: Batch | None = None
    """Images per training step, over all ranks. Default: the preset's."""
    lr: Positive | None = None
    """AdamW's peak learning rate. Default: the preset's."""
    weight_decay: NotNegative | None = None
    """AdamW's weight decay. Default: the preset's."""
    seeds: Count = 1
    """Number of heads to train; the scores are their mean, with the standard deviation."""
    head_seed: Machine[Seed | None] = None
    """Seed of the first head's weights, order and crops; +1 per further head. Default: --seed."""
    scenes: tuple[Scenes, Scenes] = (1000, 300)
    """Number of generated training and validation images, used without --data."""
    save_maps: Machine[CountOrZero] = 3
    """Number of validation images whose label maps and overlays are saved."""
    keep_tokens: Machine[bool] = True
    """Compute the tokens once and cache them, if the preset has no augmentation."""
    token_cache_gb: Machine[NotNegative] = 8.0
    """Do not cache tokens that would take more than this, in GB."""
    save_every: Machine[Count] = 200
    """Steps between saved states, from which an interrupted run resumes."""

    def __post_init__(self) -> None:
        """Validate the settings; raise ConfigError for an invalid value."""
        check(self)


LONG_SIDE = 2048
"""Longest side after the keep-ratio resize, in pixels (MMSegmentation's rule for ADE20K)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePreset:
    """A published or built-in protocol."""

    crops: tuple[int, ...]  # the first that the backbone takes is used, else the nearest to the first
    stride: int | None  # for the first crop; None: test on the whole image at once
    iterations: int
    warmup: int
    train_batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    augment: bool = True
    stretch: bool = False  # resize the whole image to a square, in training and testing


PRESETS: dict[PresetName, ProbePreset] = {
    # AM-RADIO's probe (§5.5). Its weight decay and schedule are not stated: AdamW's default and DINOv2's
    # schedule.
    "paper": ProbePreset(crops=(518, 224), stride=518, iterations=160_000, warmup=1500),
    # The protocol of the released RADIO checkpoints.
    "released": ProbePreset(crops=(518, 224), stride=None, iterations=80_000, warmup=1500, weight_decay=0.0),
    # DINOv2's linear evaluation.
    "dinov2": ProbePreset(crops=(512,), stride=341, iterations=40_000, warmup=1500, weight_decay=1e-4),
    # Half a minute on two CPU cores: no augmentation, so that tokens are computed only once.
    "scenes": ProbePreset(
        crops=(96,),
        stride=None,
        iterations=300,
        warmup=15,
        train_batch_size=32,
        lr=3e-3,
        weight_decay=1e-4,
        augment=False,
        stretch=True,
    ),
}

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """A preset with the overrides of the settings, for one backbone."""

    preset: PresetName
    crop: Size
    stride: Size | None
    resize: Literal["keep-ratio", "stretch"]
    long_side: int
    short_side: int
    augment: bool
    iterations: int
    warmup: int
    train_batch_size: int
    lr: float
    weight_decay: float

    @property
    def slides(self) -> bool:
        """Whether testing uses crops rather than whole images."""
        return self.stride is not None

    def describe(self) -> dict[str, Any]:
        """Describe the config for the report."""
        test = "whole" if self.stride is None else f"slide {_side(self.crop)}, stride {_side(self.stride)}"
        if self.resize == "stretch":
            shown = f"whole image stretched to {_side(self.crop)}, no augmentation"
        else:
            shown = (
                f"random resize 0.5-2 of ({self.long_side}, {self.short_side}), "
                f"random crop {_side(self.crop)} (largest class below 0.75), flip 0.5, photometric distortion"
            )
        return {
            "preset": self.preset,
            "crop": list(self.crop),
            "stride": list(self.stride) if self.stride else None,
            "train": shown,
            "test": f"{self.resize} resize, {test}, scored at the label's own size",
            "optimizer": f"AdamW lr {self.lr:g}, weight decay {self.weight_decay:g}",
            "schedule": f"{self.iterations} iterations, {self.warmup} of linear warm-up, then linear to 0",
            "train_batch_size": self.train_batch_size,
            "head": "batch norm, 1x1 convolution",
        }


def choose_attention(settings: SegSettings, model: Backbone) -> tuple[Backbone, tuple[str, ...]]:
    """Return the model, with global attention if only its windows do not divide the preset's crop; and notes.

    So a student with windows is probed at the same size as one without. A crop in the settings keeps them.
    """
    from radio.types import with_global_attention  # needs torch

    name, preset = _preset(settings)
    side = preset.crops[0]
    if settings.crop is not None or model.window is None or _takes(model, side):
        return model, ()
    twin = with_global_attention(model)
    if twin is None or not _takes(twin, side):
        return model, ()
    kept = model.nearest_size(side, side)[0]
    note = (
        f"the preset {name} crops {side} px, which windows of {model.window} tokens do not divide, so "
        f"{model.name} was used with global attention; --crop {kept} keeps the windows"
    )
    return twin, (note,)


def _preset(settings: SegSettings) -> tuple[PresetName, ProbePreset]:
    name: PresetName = settings.preset or ("scenes" if settings.data is None else "paper")
    return name, PRESETS[name]


def crop_size(model: Backbone, settings: SegSettings) -> Size:
    """Return the size (height, width) of the probe's crops on a backbone.

    Raises:
        SizeError: as `resolve`.
    """
    return resolve(settings, choose_attention(settings, model)[0])[0].crop


def resolve(settings: SegSettings, model: Backbone) -> tuple[ProbeConfig, tuple[str, ...]]:
    """Resolve the settings for a backbone; return the config and notes on changes that it required.

    A preset's crop that the backbone does not take is replaced by the preset's smaller one, else by the
    nearest that it takes; a crop in the settings must fit.

    Raises:
        SizeError: the backbone does not take `crop`, or a stride skips pixels or has no effect.
    """
    name, preset = _preset(settings)
    crop, notes = _crop(settings, preset, model, name)
    iterations = settings.iterations or preset.iterations
    config = ProbeConfig(
        preset=name,
        crop=crop,
        stride=_stride(settings, preset, crop),
        resize="stretch" if preset.stretch else "keep-ratio",
        long_side=LONG_SIDE,
        short_side=max(crop),
        augment=preset.augment,
        iterations=iterations,
        warmup=min(max(1, round(preset.warmup * iterations / preset.iterations)), iterations - 1),
        train_batch_size=settings.train_batch_size or preset.train_batch_size,
        lr=settings.lr or preset.lr,
        weight_decay=preset.weight_decay if settings.weight_decay is None else settings.weight_decay,
    )
    return config, notes


def _crop(
    settings: SegSettings, preset: ProbePreset, model: Backbone, name: str
) -> tuple[Size, tuple[str, ...]]:
    sides = preset.crops if settings.crop is None else (settings.crop,)
    side = next((side for side in sides if _takes(model, side)), sides[0])
    fitted = model.nearest_size(side, side)
    if fitted == (sides[0], sides[0]):
        return fitted, ()
    if settings.crop is not None:
        raise SizeError(
            f"{model.name} does not take crops of {side}x{side} px; the nearest that it takes is "
            f"{_side(fitted)}" + (f": use --crop {fitted[0]}" if fitted[0] == fitted[1] else "")
        )
    return fitted, (
        f"the preset {name} crops {sides[0]} px; {model.name} takes {_side(fitted)}, which was used",
    )


def _takes(model: Backbone, side: int) -> bool:
    return model.nearest_size(side, side) == (side, side)


def _stride(settings: SegSettings, preset: ProbePreset, crop: Size) -> Size | None:
    if preset.stretch or (preset.stride is None and settings.stride is None):
        if settings.stride is not None:
            raise SizeError(
                f"a stride of {settings.stride} px was asked for, and this preset looks at whole images; "
                f"leave --stride out or choose another --preset"
            )
        return None
    if settings.stride is not None:
        if settings.stride > min(crop):
            raise SizeError(
                f"a stride of {settings.stride} px leaves pixels between crops of {_side(crop)} unseen; "
                f"give {min(crop)} or less"
            )
        return settings.stride, settings.stride
    assert preset.stride is not None
    # With a crop other than the preset's, neighbours overlap by the same fraction.
    return round(preset.stride * crop[0] / preset.crops[0]), round(preset.stride * crop[1] / preset.crops[0])


def _side(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def keep_ratio(size: Size, long_side: int, short_side: int) -> Size:
    """Compute the size after MMSegmentation's keep-ratio resize: the largest in both limits, halves up."""
    height, width = size
    scale = min(long_side / max(size), short_side / min(size))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def shown_sizes(sizes: Iterable[Size], config: ProbeConfig, model: Backbone) -> set[Size]:
    """Collect all input sizes of the backbone: in testing on images of these sizes, and in training."""
    if config.resize == "stretch" or config.slides:
        return {config.crop}  # a slide's images are padded to the crop at least, and its crops moved inside
    resized = {keep_ratio(size, config.long_side, config.short_side) for size in sizes}
    return {config.crop, *(model.nearest_size(*size) for size in resized)}


def check_sizes(sizes: Iterable[Size], config: ProbeConfig, model: Backbone) -> None:
    """Check that the backbone takes all its input sizes.

    Raises:
        SizeError: it does not take one; names that size and the nearest one that it takes.
    """
    for size in sorted(shown_sizes(sizes, config, model)):
        fitted = model.nearest_size(*size)
        if fitted != size:
            raise SizeError(
                f"testing would show {model.name} {size[0]}x{size[1]} px, which it does not take "
                f"(the nearest is {fitted[0]}x{fitted[1]}); choose --crop {min(fitted)}"
            )

"""The protocols by name, and their adaptation to a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from radio.errors import SizeError
from radio.types import Backbone

from .settings import PresetName, SegSettings

LONG_SIDE = 2048
"""Longest side after the keep-ratio resize, in pixels (MMSegmentation's rule for ADE20K)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A published or built-in protocol."""

    crop: int
    stride: int | None  # None: test on the whole image at once
    iterations: int
    warmup: int
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    augment: bool = True
    stretch: bool = False  # resize the whole image to a square, in training and testing


PRESETS: dict[PresetName, Preset] = {
    # AM-RADIO's probe. Its weight decay and schedule are not stated: AdamW's default and DINOv2's schedule.
    "paper": Preset(crop=518, stride=518, iterations=160_000, warmup=1500),
    # The protocol of the released RADIO checkpoints.
    "released": Preset(crop=518, stride=None, iterations=80_000, warmup=1500, weight_decay=0.0),
    # DINOv2's linear evaluation.
    "dinov2": Preset(crop=512, stride=341, iterations=40_000, warmup=1500, weight_decay=1e-4),
    # Half a minute on two CPU cores: no augmentation, so that tokens are computed only once.
    "scenes": Preset(
        crop=96,
        stride=None,
        iterations=300,
        warmup=15,
        batch=32,
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
    batch: int
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
            "batch": self.batch,
            "head": "batch norm, 1x1 convolution",
        }


def resolve(settings: SegSettings, model: Backbone) -> tuple[ProbeConfig, tuple[str, ...]]:
    """Resolve the settings for a backbone; return the config and notes on changes that it required.

    A preset's crop that the backbone does not take is replaced by the nearest one that it does; a crop in the
    settings must fit.

    Raises:
        SizeError: the backbone does not take `crop`, or a stride skips pixels or has no effect.
    """
    name = settings.preset or ("scenes" if settings.data is None else "paper")
    preset = PRESETS[name]
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
        batch=settings.batch or preset.batch,
        lr=settings.lr or preset.lr,
        weight_decay=preset.weight_decay if settings.weight_decay is None else settings.weight_decay,
    )
    return config, notes


def _crop(settings: SegSettings, preset: Preset, model: Backbone, name: str) -> tuple[Size, tuple[str, ...]]:
    side = settings.crop or preset.crop
    fitted = model.nearest_size(side, side)
    if fitted == (side, side):
        return fitted, ()
    if settings.crop is not None:
        raise SizeError(
            f"{model.name} does not take crops of {side}x{side} px; the nearest that it takes is "
            f"{_side(fitted)}" + (f": use --crop {fitted[0]}" if fitted[0] == fitted[1] else "")
        )
    return fitted, (f"the preset {name} crops {side} px; {model.name} takes {_side(fitted)}, which was used",)


def _stride(settings: SegSettings, preset: Preset, crop: Size) -> Size | None:
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
    return round(preset.stride * crop[0] / preset.crop), round(preset.stride * crop[1] / preset.crop)


def _side(size: Size) -> str:
    return f"{size[0]}x{size[1]}"

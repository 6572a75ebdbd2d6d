"""Shared by evaluators of summaries: the images' views and the feature vector that is scored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from radio.adaptors import find_adaptor
from radio.config import CountOrZero, Pixels, Seed, Workers, check
from radio.errors import ConfigError
from radio.images import EVALUATION_RATIO
from radio.provenance import choose_device
from radio.types import Backbone

from .evaluator import Machine
from .features import Extraction, check_finite
from .views import make_view

# Letters: B batch, C summary width.


_CARRIED = 16_384  # summaries per call of an adaptor

Scenes = Annotated[int, Interval(ge=1, le=10_000_000)]
"""Number of images of the generated world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionSettings:
    """Settings of the feature extraction."""

    limit: CountOrZero | None = None
    """Maximum number of images of each set, spread evenly. Default: all."""
    view: Literal["center", "short-side"] = "center"
    """A centre crop, or the whole image with its aspect ratio preserved."""
    size: Pixels | None = None
    """Side of the crop, or the short side, in pixels. Default: the model's own size."""
    ratio: Annotated[float, Interval(ge=1, le=16)] = EVALUATION_RATIO
    """Factor on the size that the image is resized to before the centre crop."""
    batch: Machine[Annotated[int, Interval(ge=1, le=65_536)]] = 64
    """Images per forward pass; does not change the scores."""
    workers: Machine[Workers | None] = None
    """Loader processes. Default: none on a CPU, up to 8 with a GPU."""
    cache: Machine[Path | None] = None
    """Folder that caches features. Default: $XDG_CACHE_HOME/am-radio, or ~/.cache/am-radio."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model. On a GPU fp32 computes matrix products in TF32, unless NVIDIA_TF32_OVERRIDE=0
    is set."""
    seed: Seed = 0
    """Seed of the generated world."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        if self.batch < 1:
            raise ConfigError(f"batch = {self.batch}: give 1 or more")
        check(self)


def make_extraction(
    model: Backbone, settings: ExtractionSettings, head: str | None
) -> tuple[Extraction, tuple[str, ...]]:
    """Plan the extraction of a model's own summaries, with notes; `to_teacher_space` maps them to `head`.

    Raises:
        ConfigError: an unknown device, or a head that the model does not have.
        SizeError: a size below one pixel, or too many pixels.
    """
    _check_head(model, head)
    device = choose_device(settings.device)
    view, notes = make_view(model, settings.view, settings.size, settings.ratio)
    workers = settings.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    how = Extraction(
        view=view,
        device=device,
        dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        batch=settings.batch,
        workers=workers,
    )
    return how, notes


def to_teacher_space(model: Backbone, head: str | None, summaries: Tensor) -> Tensor:
    """Map extracted summaries [B, C] into the space of teacher `head`; None leaves them unchanged.

    One extraction serves every head. Computed on the CPU in float32, as it is a small part of the work.
    """
    if head is None:
        return summaries
    adaptor = find_adaptor(model.to(torch.device("cpu"), torch.float32), head)
    with torch.inference_mode():
        carried = torch.cat([adaptor.adapt_summary(part) for part in summaries.split(_CARRIED)])
    check_finite(carried, f"{model.name} in the space of {head}")
    return carried


def resolved(how: Extraction, head: str | None) -> dict[str, Any]:
    """Return the resolved settings, for a report."""
    return {
        "view": how.view.describe(),
        "size": list(how.view.size),
        "features": "summary" if head is None else f"adaptor {head}",
        "dtype": how.numbers.removeprefix("torch."),
        "workers": how.workers,
    }


def _check_head(model: Backbone, head: str | None) -> None:
    if head is None:
        return
    if not model.adaptors:
        raise ConfigError(f"{model.name} has no adaptors, so no head {head!r}; leave --head out")
    to_teacher_space(model, head, torch.empty(0, model.summary_dim))  # an unknown name raises here

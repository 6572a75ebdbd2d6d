"""What evaluators of summaries share: how pictures are shown to a model, and which vector of each is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Interval
from torch import Tensor

from radio.config import CountOrZero, Pixels, Seed, Workers, check
from radio.errors import ConfigError
from radio.images import EVALUATION_RATIO
from radio.types import Backbone

from .evaluator import Machine
from .features import Extraction, check_finite
from .provenance import choose_device
from .views import make_view

# Letters: B batch, C summary width.


_CARRIED = 16_384  # summaries that go through an adaptor at once

Scenes = Annotated[int, Interval(ge=1, le=10_000_000)]
"""How many pictures of the generated world."""


@runtime_checkable
class Adapting(Protocol):
    """A model that carries its summaries into a teacher's space."""

    def adapt_summary(self, name: str, summaries: Tensor) -> Tensor:
        """Summaries [B, C] in the space of teacher `name`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionSettings:
    """How pictures become features."""

    limit: CountOrZero | None = None
    """Use so many pictures of each set, spread evenly."""
    view: Literal["center", "short-side"] = "center"
    """A square from the middle, or the whole picture with its aspect kept."""
    size: Pixels | None = None
    """Side of the square, or the short side, in pixels. The model's own size unless given."""
    ratio: Annotated[float, Interval(ge=1, le=16)] = EVALUATION_RATIO
    """The picture is resized to this times the size before the middle is cut out."""
    batch: Machine[Annotated[int, Interval(ge=1, le=65_536)]] = 64
    """Pictures that go through the model together; does not change the scores."""
    workers: Machine[Workers | None] = None
    """Loader processes; none on a CPU and up to 8 beside a GPU unless given."""
    cache: Machine[Path | None] = None
    """Where features are kept. $XDG_CACHE_HOME/am-radio unless given."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the model computes in. On a GPU fp32 takes its products in TF32, unless NVIDIA_TF32_OVERRIDE=0 is
    set."""
    seed: Seed = 0
    """Which generated world."""

    def __post_init__(self) -> None:
        """Refuse what no data could make sense of."""
        if self.batch < 1:
            raise ConfigError(f"batch = {self.batch}: give 1 or more")
        check(self)


def plan(
    model: Backbone, settings: ExtractionSettings, head: str | None
) -> tuple[Extraction, tuple[str, ...]]:
    """The extraction of a model's own summaries, which `carry` then takes to `head`, and notes on it.

    Raises:
        ConfigError: an unknown device, or a head that the model does not have.
        SizeError: a size that holds no picture.
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


def carry(model: Backbone, head: str | None, summaries: Tensor) -> Tensor:
    """Extracted summaries [B, C] in the space of teacher `head`; as they are where none is named.

    One extraction serves every head. Computed on the CPU in float32: it is a small part of the work.
    """
    if head is None:
        return summaries
    assert isinstance(model, Adapting), "plan has looked"
    on_cpu = model.to(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        carried = torch.cat([on_cpu.adapt_summary(head, part) for part in summaries.split(_CARRIED)])
    check_finite(carried, f"{model.name} in the space of {head}")
    return carried


def resolved(how: Extraction, head: str | None) -> dict[str, Any]:
    """What the settings came to, for a report."""
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
    if not isinstance(model, Adapting):
        raise ConfigError(f"{model.name} has no adaptors, so no head {head!r}; leave --head out")
    carry(model, head, torch.empty(0, model.summary_dim))  # an unknown name raises here

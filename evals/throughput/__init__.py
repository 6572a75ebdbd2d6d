"""Images per second of one or several models, measured alternately, with a report for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, late
from radio.config import AttentionWindow, Pixels, check
from radio.errors import ConfigError

Seconds = Annotated[float, Interval(ge=0, le=86_400)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputSettings:
    """Measure images per second on random input that is already on the device."""

    batches: tuple[Annotated[int, Interval(ge=1, le=65_536)], ...] | None = None
    """Batch sizes, measured one after the other. Default: 1 and 8, or the preset's."""
    resolution: Pixels | None = None
    """Side of the images in pixels. Default: each model's own size."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the models. auto: fp32 on a CPU, bf16 on CUDA."""
    compile: bool = False
    """Also measure every model compiled by torch.compile."""
    with_adaptors: bool = False
    """Also measure every model that has adaptors with all of them."""
    layout: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Memory layout of images and weights. auto: channels-last for models with convolutions beyond a stem."""
    preset: Literal["timm", "paper"] | None = None
    """timm: batch 256, 10 warm-up and 40 measured calls, as in timm's benchmark. paper: batch 128."""
    repeats: Annotated[int, Interval(ge=1, le=100_000)] = 5
    """Measurements per model and batch; the median is reported."""
    repeat_seconds: Seconds = 1.0
    """Approximate length of a measurement; at least one call."""
    warmup_seconds: Seconds = 3.0
    """Warm-up before the first measurement; at least one call."""
    threads: Annotated[int, Interval(ge=1, le=1024)] | None = None
    """CPU threads. Default: torch's."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they cannot be measured."""
        check(self)
        own = (self.repeats, self.repeat_seconds, self.warmup_seconds)
        if self.preset is not None and own != (5, 1.0, 3.0):
            raise ConfigError(
                f"the preset {self.preset} says how long to measure; leave --repeats, --repeat-seconds and "
                f"--warmup-seconds out, or the preset"
            )
        if self.batches == ():
            raise ConfigError("--batches names no batch size; give one, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputOptions:
    """Models, reference and output of the measurement."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Architectures (untrained, which does not affect speed), checkpoint files, or teachers' specs."""
    table6: bool = False
    """Also measure every architecture of the paper's table 6."""
    window: tuple[AttentionWindow, ...] = ()
    """Measure every model with attention windows of these sides in tokens, or global: a ViT with global
    attention in every block."""
    reference: str | None = None
    """The model that ratios refer to. Default: the first."""
    out: Path = Path("reports")
    """Folder of the reports. If it has k-NN reports of the same models, quality is plotted against speed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    plain: bool = False
    """Print without progress bars, colours and box lines."""
    settings: Annotated[ThroughputSettings, tyro.conf.arg(name="")] = field(
        default_factory=ThroughputSettings
    )


@evaluators.register("throughput")
def make() -> Evaluator[ThroughputSettings]:
    """Images per second, multiply-adds and memory of several models, measured alternately."""
    return Evaluator(
        name="throughput",
        settings=ThroughputSettings,
        evaluate=late("evals.throughput.evaluator:evaluate"),
        title="throughput",
        on_request=True,  # no score: it wants an otherwise idle machine
        data_sets=lambda settings, _: {OWN: settings},  # it needs none
    )

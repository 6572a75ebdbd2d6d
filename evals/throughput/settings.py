"""Settings of a throughput measurement. Every field is a flag of `radio-eval throughput`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Interval

from radio.benchmark import PRESETS, Protocol
from radio.config import Pixels, check
from radio.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Batch = Annotated[int, Interval(ge=1, le=65_536)]
Windows = Annotated[int, Interval(ge=1, le=100_000)]
Seconds = Annotated[float, Interval(ge=0, le=86_400)]
Threads = Annotated[int, Interval(ge=1, le=1024)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputSettings:
    """Measure images per second on random input that is already on the device."""

    batches: tuple[Batch, ...] | None = None
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
    repeats: Windows = 5
    """Measured windows per model and batch; the median is reported."""
    window_seconds: Seconds = 1.0
    """Approximate length of a window; at least one call."""
    warmup_seconds: Seconds = 3.0
    """Warm-up before the first window; at least one call."""
    threads: Threads | None = None
    """CPU threads. Default: torch's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they cannot be measured."""
        check(self)
        own = (self.repeats, self.window_seconds, self.warmup_seconds)
        if self.preset is not None and own != (5, 1.0, 3.0):
            raise ConfigError(
                f"the preset {self.preset} says how long to measure; leave --repeats, --window-seconds and "
                f"--warmup-seconds out, or the preset"
            )
        self.protocol  # noqa: B018 (checks itself)

    @property
    def protocol(self) -> Protocol:
        """Batches, warm-up and windows.

        Raises:
            ConfigError: a count below 1 or a negative time.
        """
        whole = (
            PRESETS[self.preset]
            if self.preset is not None
            else Protocol(
                repeats=self.repeats,
                window_seconds=self.window_seconds,
                warmup_seconds=self.warmup_seconds,
            )
        )
        return whole if self.batches is None else replace(whole, batches=self.batches)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the precision of the models on a device."""
        return DTYPES[("fp32" if device.type == "cpu" else "bf16") if self.dtype == "auto" else self.dtype]

    @property
    def channels_last(self) -> bool | None:
        """Whether to use channels-last; None leaves it to each model."""
        return None if self.layout == "auto" else self.layout == "channels-last"

"""What can be chosen about a measurement of speed. Every field is a flag of `radio-eval throughput`."""

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
    """Images a second on random input that lies on the device."""

    batches: tuple[Batch, ...] | None = None
    """Pictures in a call, one after the other: 1 and 8, or the preset's, unless given."""
    resolution: Pixels | None = None
    """Side of the pictures in pixels. Each model's own size unless given."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the models compute in. auto: fp32 on a CPU, bf16 on CUDA."""
    compile: bool = False
    """Measure every model compiled by torch.compile too."""
    with_adaptors: bool = False
    """Measure every model that has adaptors with all of them too."""
    layout: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Of pictures and weights in memory. auto: channels-last for models with convolutions beyond a stem."""
    preset: Literal["timm", "paper"] | None = None
    """timm: batch 256, 10 calls to warm up and 40 that count, as timm's benchmark. paper: batch 128."""
    windows: Windows = 5
    """Measured windows of each model and batch; their median counts."""
    window_seconds: Seconds = 1.0
    """About how long a window is; one call at least."""
    warmup_seconds: Seconds = 3.0
    """Before the first window; one call at least."""
    threads: Threads | None = None
    """Threads of the CPU. As many as torch takes unless given."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check(self)
        own = (self.windows, self.window_seconds, self.warmup_seconds)
        if self.preset is not None and own != (5, 1.0, 3.0):
            raise ConfigError(
                f"the preset {self.preset} says how long to measure; leave --windows, --window-seconds and "
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
                windows=self.windows,
                window_seconds=self.window_seconds,
                warmup_seconds=self.warmup_seconds,
            )
        )
        return whole if self.batches is None else replace(whole, batches=self.batches)

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What is computed in on a device."""
        return DTYPES[("fp32" if device.type == "cpu" else "bf16") if self.dtype == "auto" else self.dtype]

    @property
    def channels_last(self) -> bool | None:
        """None where each model decides."""
        return None if self.layout == "auto" else self.layout == "channels-last"

"""Measure images per second, multiply-adds and memory of several models by one protocol in one run.

Random input on the device; evaluation mode; inference mode; a warm-up; then windows of several calls each,
alternating between the models (A B A B ...), so that a disturbance of the machine affects all of them and
the ratios between them hold.
"""

from __future__ import annotations

import copy
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .errors import ConfigError
from .model import RadioModel
from .types import Features

# Letters: B batch, h w pixels.

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How speed is measured."""

    batches: tuple[int, ...] = (1, 8)  # B, measured one after the other
    warmup_seconds: float = 3.0  # minimum, per model and batch
    warmup_calls: int = 1  # minimum
    repeats: int = 5
    window_seconds: float = 1.0  # approximate; at least one call
    window_calls: int | None = None  # exact number of calls, instead of window_seconds

    def __post_init__(self) -> None:
        """Validate the settings; raise ConfigError for those that cannot be measured."""
        counts = (
            *self.batches,
            self.warmup_calls,
            self.repeats,
            1 if self.window_calls is None else self.window_calls,
        )
        if not self.batches or min(counts) < 1 or min(self.warmup_seconds, self.window_seconds) < 0:
            raise ConfigError(
                f"{self} cannot be measured: give at least one batch, counts of 1 or more, times of 0 or more"
            )


PRESETS: Mapping[str, Protocol] = {
    # timm's benchmark.py: 10 calls to warm up, 40 that count
    "timm": Protocol(batches=(256,), warmup_seconds=0, warmup_calls=10, repeats=5, window_calls=8),
    # the paper does not specify it; large batches, as usual for throughput on a GPU
    "paper": Protocol(batches=(128,), warmup_seconds=3, warmup_calls=10, repeats=5, window_seconds=2),
}
"""Protocols of other projects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkModel:
    """One model, on its device, ready to be called."""

    name: str
    call: Callable[[Tensor], object]
    images: Callable[[int], Tensor]  # B -> [B, 3, h, w] in [0, 1], on the device
    compiled: bool = False
    weight_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The speed of one model at one batch."""

    name: str
    batch: int
    rates: tuple[float, ...]  # images per second in each window
    calls: int  # in each window
    peak_memory: float | None  # MiB: weights and what the calls add; None where unknown

    @property
    def images_per_second(self) -> float:
        """The median over the windows."""
        return statistics.median(self.rates)

    @property
    def low(self) -> float:
        """The slowest window."""
        return min(self.rates)

    @property
    def high(self) -> float:
        """The fastest window."""
        return max(self.rates)

    @property
    def spread(self) -> float:
        """Half of the range, in percent of the median."""
        return 50 * (self.high - self.low) / self.images_per_second


Clock = Callable[[], float]
Told = Callable[[str], None]


@torch.inference_mode()
def measure(
    contenders: Sequence[BenchmarkModel],
    protocol: Protocol,
    device: torch.device,
    *,
    clock: Clock | None = None,
    done: Told = lambda name: None,
) -> list[Measurement]:
    """Measure the speed of every contender at every batch size, alternating between contenders.

    Args:
        contenders: models on `device`.
        protocol: batches, warm-up and windows.
        device: where they compute.
        clock: returns the time in seconds once the device is idle; replaced in tests.
        done: called with a contender's name after its warm-up and after each of its windows.
    """
    clock = clock or device_clock(device)
    found = []
    for batch in protocol.batches:
        prepared = []
        for contender in contenders:
            images = contender.images(batch)
            prepared.append((contender, images, *_warm_up(contender, images, protocol, device, clock)))
            done(contender.name)
        rates: list[list[float]] = [[] for _ in contenders]
        for _ in range(protocol.repeats):
            for (contender, images, calls, _), mine in zip(prepared, rates, strict=True):
                mine.append(batch * calls / _window(contender, images, calls, clock))
                done(contender.name)
        found += [
            Measurement(name=c.name, batch=batch, rates=tuple(mine), calls=calls, peak_memory=peak)
            for (c, _, calls, peak), mine in zip(prepared, rates, strict=True)
        ]
    return found


def num_turns(protocol: Protocol, contenders: int) -> int:
    """Return how often `measure` calls `done`."""
    return len(protocol.batches) * contenders * (1 + protocol.repeats)


def device_clock(device: torch.device) -> Clock:
    """Build a clock that returns the time in seconds once the device is idle."""
    if device.type != "cuda":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _warm_up(
    contender: BenchmarkModel, images: Tensor, protocol: Protocol, device: torch.device, clock: Clock
) -> tuple[int, float | None]:
    """Warm a contender up; return the number of calls per window and the peak memory in MiB."""
    if contender.compiled:
        contender.call(images)  # the compiler's own time and memory are not the model's
    taken: list[float] = []
    with peak_memory(device) as peak:
        while len(taken) < protocol.warmup_calls or sum(taken) < protocol.warmup_seconds:
            taken.append(_window(contender, images, 1, clock))
    calls = protocol.window_calls or max(1, math.ceil(protocol.window_seconds / min(taken)))
    rise = peak[0]
    return calls, None if rise is None else (contender.weight_bytes + rise) / MIB


def _window(contender: BenchmarkModel, images: Tensor, calls: int, clock: Clock) -> float:
    """Measure the seconds that `calls` calls take."""
    start = clock()
    for _ in range(calls):
        contender.call(images)
    return clock() - start


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float | None]]:
    """Yield a list that afterwards holds the peak rise of memory in bytes: of the GPU, or the resident set.

    Its value is None where the system does not report it (outside Linux).
    """
    rise: list[float | None] = [None]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield rise
        rise[0] = float(torch.cuda.max_memory_allocated(device) - before)
        return
    start = _reset_resident_peak()
    yield rise
    if start is not None:
        rise[0] = max(0.0, _resident("VmHWM") - start)


def _reset_resident_peak() -> float | None:
    """Reset the peak of the resident set and return its size in bytes; None if unsupported."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier models would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Counts(NamedTuple):
    """Cost of a model, independent of the hardware."""

    parameters: int
    gmacs: float  # 10^9 multiply-adds of one image


def count(module: nn.Module, size: tuple[int, int]) -> Counts:
    """Count parameters and multiply-adds for one image of (height, width) on the meta device."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in module.parameters()), torch.float32)
    image = torch.empty(1, 3, *size, device="meta", dtype=dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(module, shapes, (image,))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Counts(parameters, counter.get_total_flops() / 2e9)


@final
class Adapted(nn.Module):
    """A model with all its adaptors, on the student's own grid.

    Raises:
        ConfigError: the model has no adaptors.
    """

    def __init__(self, model: RadioModel) -> None:
        super().__init__()
        if not model.adaptors:
            raise ConfigError(f"{model.name} has no adaptors to measure; leave --with-adaptors out")
        self.model = model

    def forward(self, images: Tensor) -> tuple[Features, list[Features]]:
        """Map [B, 3, h, w] to the student's own features and those in each teacher's space."""
        features = self.model(images)
        return features, [self.model.adapt(name, features) for name in self.model.adaptors]


def prepare(
    name: str,
    model: Any,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels_last: bool | None = None,
    compiled: bool = False,
) -> BenchmarkModel:
    """Make a contender of a backbone or a module on the device; copy it if its dtype changes.

    Args:
        size: (height, width) of its images.
        channels_last: None = chosen by `is_convolutional`.
    """
    if isinstance(model, nn.Module) and any(weight.dtype != dtype for weight in model.parameters()):
        model = copy.deepcopy(model)  # its own weights keep their precision
    moved = model.to(device, dtype).eval()
    last = is_convolutional(moved) if channels_last is None else channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    if isinstance(moved, nn.Module):
        moved.to(memory_format=layout)

    def images(batch: int) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(0)
        random_images = torch.rand(batch, 3, *size, generator=generator, device=device, dtype=dtype)
        return random_images.contiguous(memory_format=layout)

    weights = moved.parameters() if isinstance(moved, nn.Module) else ()
    return BenchmarkModel(
        name=name,
        call=torch.compile(moved, dynamic=False) if compiled else moved,
        images=images,
        compiled=compiled,
        weight_bytes=sum(weight.nbytes for weight in weights),
    )


def is_convolutional(model: Any) -> bool:
    """Check whether a model has more than four convolutions, so more than a stem."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return sum(isinstance(module, nn.Conv2d) for module in modules) > 4

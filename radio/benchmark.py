"""Measure images per second and memory of several models by one protocol in one run, and count operations.

Random input on the device; evaluation mode; inference mode; a warm-up; then repeats of several calls each,
alternating between the models (A B A B ...), so that a disturbance of the machine affects all of them and
the ratios between them hold.
"""

from __future__ import annotations

import copy
import ctypes
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .errors import ConfigError
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
    repeat_seconds: float = 1.0  # approximate; at least one call
    repeat_calls: int | None = None  # exact number of calls, instead of repeat_seconds

    def __post_init__(self) -> None:
        """Validate the settings; raise ConfigError for those that cannot be measured."""
        repeat_calls = 1 if self.repeat_calls is None else self.repeat_calls
        counts = (*self.batches, self.warmup_calls, self.repeats, repeat_calls)
        if not self.batches or min(counts) < 1 or min(self.warmup_seconds, self.repeat_seconds) < 0:
            raise ConfigError(
                f"{self} cannot be measured: give at least one batch, counts of 1 or more, times of 0 or more"
            )


PRESETS: Mapping[str, Protocol] = {
    # timm's benchmark.py: 10 calls to warm up, 40 that count
    "timm": Protocol(batches=(256,), warmup_seconds=0, warmup_calls=10, repeats=5, repeat_calls=8),
    # the paper does not specify it; large batches, as usual for throughput on a GPU
    "paper": Protocol(batches=(128,), warmup_seconds=3, warmup_calls=10, repeats=5, repeat_seconds=2),
}
"""Protocols of other projects."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkModel:
    """One variant of a model, on its device, ready to be called."""

    name: str
    variant: str = "alone"  # or "compiled", "with adaptors", "with adaptors, compiled"
    call: Callable[[Tensor], object]
    images: Callable[[int], Tensor]  # B -> [B, 3, h, w] in [0, 1], on the device
    compiled: bool = False
    weight_bytes: int = 0


def prepare(
    name: str,
    model: Any,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels_last: bool | None = None,
    compiled: bool = False,
    adaptors: bool = False,
) -> BenchmarkModel:
    """Move a backbone or a module to the device, ready to be measured; copy it if its dtype changes.

    Args:
        name: its name in the measurements.
        model: the backbone, or any other callable module.
        size: (height, width) of its images.
        device: where it computes.
        dtype: of its weights and images.
        channels_last: memory layout; None = chosen by `is_convolutional`.
        compiled: compile it.
        adaptors: of a RadioModel: also compute the features in each teacher's space, on the student's grid.
    """
    if isinstance(model, nn.Module) and any(weight.dtype != dtype for weight in model.parameters()):
        model = copy.deepcopy(model)  # its own weights keep their precision
    moved = model.to(device, dtype).eval()
    last = is_convolutional(moved) if channels_last is None else channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    if isinstance(moved, nn.Module):
        moved.to(memory_format=layout)
    weights = moved.parameters() if isinstance(moved, nn.Module) else ()

    def images(batch: int) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(0)
        random_images = torch.rand(batch, 3, *size, generator=generator, device=device, dtype=dtype)
        return random_images.contiguous(memory_format=layout)

    def adapted(images: Tensor) -> list[Features]:
        features = moved(images)
        return [features, *(moved.adapt(teacher, features) for teacher in moved.adaptors)]

    call = adapted if adaptors else moved
    variants = [*(["with adaptors"] if adaptors else []), *(["compiled"] if compiled else [])]
    return BenchmarkModel(
        name=name,
        variant=", ".join(variants) or "alone",
        call=torch.compile(call, dynamic=False) if compiled else call,
        images=images,
        compiled=compiled,
        weight_bytes=sum(weight.nbytes for weight in weights),
    )


def is_convolutional(model: Any) -> bool:
    """Check whether a model has more than four convolutions, so more than a stem."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return sum(isinstance(module, nn.Conv2d) for module in modules) > 4


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The speed of one model at one batch."""

    name: str
    variant: str
    batch: int
    rates: tuple[float, ...]  # images per second in each repeat
    calls: int  # in each repeat
    peak_memory: float | None  # MiB: weights and what the calls add; None where unknown

    @property
    def images_per_second(self) -> float:
        """The median over the repeats."""
        return statistics.median(self.rates)

    @property
    def low(self) -> float:
        """The slowest repeat."""
        return min(self.rates)

    @property
    def high(self) -> float:
        """The fastest repeat."""
        return max(self.rates)

    @property
    def spread(self) -> float:
        """Half of the range, in percent of the median."""
        return 50 * (self.high - self.low) / self.images_per_second


@torch.inference_mode()
def measure(
    models: Sequence[BenchmarkModel],
    protocol: Protocol,
    device: torch.device,
    *,
    clock: Callable[[], float] | None = None,
    done: Callable[[str], None] = lambda name: None,
) -> list[Measurement]:
    """Measure the speed of every model at every batch size, alternating between models.

    Args:
        models: models on `device`.
        protocol: batches, warm-up and repeats.
        device: where they compute.
        clock: returns the time in seconds once the device is idle; replaced in tests.
        done: called with a model's name after its warm-up and after each of its repeats.
    """
    clock = clock or partial(_read_clock, device)
    measurements = []
    for batch in protocol.batches:
        inputs, calls, peaks = [], [], []
        for model in models:
            inputs.append(model.images(batch))
            if model.compiled:
                model.call(inputs[-1])  # the compiler's own time and memory are not the model's
            times: list[float] = []
            with peak_memory(device) as peak:
                while len(times) < protocol.warmup_calls or sum(times) < protocol.warmup_seconds:
                    times.append(_time_calls(model, inputs[-1], 1, clock))
            calls.append(protocol.repeat_calls or max(1, math.ceil(protocol.repeat_seconds / min(times))))
            peaks.append(None if peak[0] is None else (model.weight_bytes + peak[0]) / MIB)
            done(model.name)
        rates: list[list[float]] = [[] for _ in models]
        for _ in range(protocol.repeats):
            for index, model in enumerate(models):
                seconds = _time_calls(model, inputs[index], calls[index], clock)
                rates[index].append(batch * calls[index] / seconds)
                done(model.name)
        measurements += [
            Measurement(
                name=model.name,
                variant=model.variant,
                batch=batch,
                rates=tuple(rates[index]),
                calls=calls[index],
                peak_memory=peaks[index],
            )
            for index, model in enumerate(models)
        ]
    return measurements


def alternate(jobs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median CPU seconds of each job, run in turn `rounds` times, every other time backwards."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for turn in range(rounds):
        for index in range(len(jobs)) if turn % 2 == 0 else reversed(range(len(jobs))):
            start = time.process_time()
            jobs[index]()
            seconds[index].append(time.process_time() - start)
    return [statistics.median(times) for times in seconds]


def num_turns(protocol: Protocol, num_models: int) -> int:
    """Return how often `measure` calls `done`."""
    return len(protocol.batches) * num_models * (1 + protocol.repeats)


def _read_clock(device: torch.device) -> float:
    """Return the time in seconds once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time_calls(model: BenchmarkModel, images: Tensor, calls: int, clock: Callable[[], float]) -> float:
    """Measure the seconds that `calls` calls take."""
    start = clock()
    for _ in range(calls):
        model.call(images)
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
    start: float | None = None
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier models would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak
        start = _resident("VmRSS")
    yield rise
    if start is not None:
        rise[0] = max(0.0, _resident("VmHWM") - start)


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
    with torch.no_grad(), CostCounter() as counter:
        functional_call(module, shapes, (image,))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Counts(parameters, counter.flops / 2e9)


_ATEN = torch.ops.aten
_GPU_KERNELS = {  # torch has formulas for the GPU attention kernels, which take the same arguments
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}


class CostCounter(TorchDispatchMode):
    """Count operations (two per multiply-add), and the bytes that they allocated: now, and at the peak.

    Works on real, fake and meta tensors, in forward and backward. Operations are counted by torch's formulas;
    every storage is tracked from its allocation until nothing references it any more. Tensors from before,
    such as weights and inputs, are not counted. Torch's `FlopCounterMode` counts the same operations, but
    keeps the graphs of checkpointed blocks alive, which are a part of the peak; its `MemTracker` counts the
    weights too, and looks at every module after every operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.now = self.peak = 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; add its operations and track its new storages."""
        named = kwargs or {}
        self._track((args, named), counted=False)
        out = func(*args, **named)
        self._track(out, counted=True)
        packet = func.overloadpacket
        if (formula := flop_registry.get(_GPU_KERNELS.get(packet, packet))) is not None:
            self.flops += int(formula(*args, **named, out_val=out))
        return out

    def _track(self, tensors: Any, *, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._hold(storage, storage.nbytes() if counted else 0)

    def _hold(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def release(_: Any) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)

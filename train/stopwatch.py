"""Time of a step by phase and by group of teachers.

On a GPU times are CUDA events, which are read only on log steps; a step never waits for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor, nn

Phase = Literal["data", "teachers", "forward", "backward", "communication", "optimiser"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_BUSY: tuple[Phase, ...] = ("teachers", "forward", "backward")


class Times(NamedTuple):
    """Seconds per step."""

    phases: dict[str, float]
    groups: dict[str, float]  # that one rank is busy for the group; overlaps are split evenly

    def record(self) -> dict[str, float]:
        """Return the times by their names in the log."""
        return {
            **{f"time/{phase}": seconds for phase, seconds in self.phases.items()},
            **{f"perf/step_time/{group}": seconds for group, seconds in self.groups.items()},
        }


class _Span(NamedTuple):
    phase: Phase
    group: str
    start: Any
    end: Any


class Busy(NamedTuple):
    """An interval in which a rank works for a group."""

    group: str
    start: float  # seconds from any origin
    end: float


def busy_seconds(stretches: Sequence[Busy]) -> dict[str, float]:
    """Split the time covered by any interval over the groups: evenly, where several are at work."""
    seconds = {each.group: 0.0 for each in stretches}
    edges = sorted(
        [(each.start, 1, each.group) for each in stretches]
        + [(each.end, -1, each.group) for each in stretches]
    )
    depth = dict.fromkeys(seconds, 0)
    before = 0.0
    for now, step, group in edges:
        if working := [name for name in depth if depth[name]]:
            for name in working:
                seconds[name] += (now - before) / len(working)
        depth[group] += step
        before = now
    return seconds


@final
class Stopwatch:
    """Times the code inside `time`, in any thread.

    Where teachers are prefetched in a separate thread (and stream), or groups run in parallel, phases overlap
    and add up to more than the step. A group's seconds count no moment twice: overlaps are split evenly over
    the groups at work, so all groups of a rank add up to the time that it is busy. Communication during a
    backward counts from this rank's last gradient on (DDP; FSDP2 communicates throughout forward and
    backward, which cannot be distinguished).

    Args:
        device: the device that is timed.
        last: weights that get their gradients last in a backward: those that the images meet first.
    """

    def __init__(self, device: torch.device, last: Iterable[nn.Parameter] = ()) -> None:
        on_gpu = device.type == "cuda"
        self._now: Callable[[], Any] = _event if on_gpu else time.perf_counter
        self._origin: Any = None  # common origin for all threads and streams
        self._between: Callable[[Any, Any], float] = _elapsed if on_gpu else lambda start, end: end - start
        self._spans: list[_Span] = []
        self._waited = 0.0
        self._ready: Any = None
        for weight in last:
            weight.register_post_accumulate_grad_hook(self._note)

    @contextmanager
    def time(self, phase: Phase, group: str = "") -> Iterator[None]:
        """Time the enclosed code as part of a phase, and of a group of teachers if one is named."""
        start = self._now()
        self._ready = None if phase == "backward" else self._ready
        yield
        end = self._now()
        if phase == "backward" and self._ready is not None:
            self._spans.append(_Span("communication", "", self._ready, end))
            end = self._ready
        self._spans.append(_Span(phase, group, start, end))

    def waited(self, seconds: float) -> None:
        """Count seconds that the host spent waiting for data."""
        self._waited += seconds

    def read(self, steps: int) -> Times:
        """Return the means over the steps since the last reading, and reset; the only host sync."""
        spans, self._spans = self._spans, []
        phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        busy: list[Busy] = []
        if self._origin is None and spans:
            self._origin = spans[0].start
        for span in spans:
            seconds = self._between(span.start, span.end)
            phases[span.phase] += seconds / steps
            if span.group and span.phase in _BUSY:
                start = self._between(self._origin, span.start)
                busy.append(Busy(span.group, start, start + seconds))
        phases["data"] += self._waited / steps
        self._waited = 0.0
        return Times(phases, {group: seconds / steps for group, seconds in busy_seconds(busy).items()})

    def _note(self, weight: Tensor) -> None:
        self._ready = self._now()


def mean_times(times: Sequence[Times]) -> Times:
    """Average the times of ranks: phases over all ranks, a group's over the ranks that work for it."""
    phases: dict[str, float] = {
        phase: sum(each.phases[phase] for each in times) / len(times) for phase in PHASES
    }
    groups: dict[str, list[float]] = {}
    for each in times:
        for name, seconds in each.groups.items():
            groups.setdefault(name, []).append(seconds)
    return Times(phases, {name: sum(found) / len(found) for name, found in groups.items()})


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000

"""Where the time of a step goes: by kind of work, and by group of teachers.

On a GPU the moments are events on its stream, which are read on log steps alone; a step never waits for one.
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
    """Seconds a step."""

    phases: dict[str, float]
    groups: dict[str, float]  # that one rank is busy for the group; moments of several are shared out

    def record(self) -> dict[str, float]:
        """The figures under their names in the log."""
        return {
            **{f"time/{phase}": seconds for phase, seconds in self.phases.items()},
            **{f"seconds/{group}": seconds for group, seconds in self.groups.items()},
        }


class _Span(NamedTuple):
    phase: Phase
    group: str
    start: Any
    end: Any


class Busy(NamedTuple):
    """A stretch of time in which a rank works for a group."""

    group: str
    start: float  # seconds from anywhere
    end: float


def busy_seconds(stretches: Sequence[Busy]) -> dict[str, float]:
    """Share out the time that is covered by any stretch: each moment evenly to the groups at work in it."""
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
    """Times what happens inside `time`, in whichever thread.

    Where teachers work ahead in a thread (and on a stream) of their own, or groups go abreast, phases
    overlap, and add up to more than the step. A group's seconds count no moment twice: what overlaps is
    shared evenly by the groups at work, so that all groups of a rank add up to the time that it is busy.
    What the ranks exchange during a backward counts as communication from the moment when this rank has its
    last gradient (DDP; FSDP2 exchanges all through forward and backward, which is not told apart).

    Args:
        device: where the work is done.
        last: weights whose gradients are the last of a backward: those that the pictures meet first.
    """

    def __init__(self, device: torch.device, last: Iterable[nn.Parameter] = ()) -> None:
        on_gpu = device.type == "cuda"
        self._now: Callable[[], Any] = _event if on_gpu else time.perf_counter
        self._origin: Any = None  # of the time line that spans of all threads and streams lie on
        self._between: Callable[[Any, Any], float] = _elapsed if on_gpu else lambda start, end: end - start
        self._spans: list[_Span] = []
        self._waited = 0.0
        self._ready: Any = None
        for weight in last:
            weight.register_post_accumulate_grad_hook(self._note)

    @contextmanager
    def time(self, phase: Phase, group: str = "") -> Iterator[None]:
        """What goes inside belongs to a phase, and to a group of teachers if one is named."""
        start = self._now()
        self._ready = None if phase == "backward" else self._ready
        yield
        end = self._now()
        if phase == "backward" and self._ready is not None:
            self._spans.append(_Span("communication", "", self._ready, end))
            end = self._ready
        self._spans.append(_Span(phase, group, start, end))

    def waited(self, seconds: float) -> None:
        """Count so many seconds of the host as spent on waiting for data."""
        self._waited += seconds

    def read(self, steps: int) -> Times:
        """The means over the steps since the last reading, which this ends; the only host sync."""
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
    """What several ranks measured: the phases' means over all, a group's over the ranks that work for it."""
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

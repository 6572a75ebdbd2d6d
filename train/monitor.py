"""Measurements of a run: means of scalars, steps skipped as not finite, time by phase and group, and speed.

All of them are kept on the device and read on log steps only: a step never waits for one (saves and
evaluations wait for the device, too).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, final, get_args

import torch
from annotated_types import Interval
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import TypedDict

from radio.dist import Ranks
from radio.errors import RadioError

from .config import TrainConfig
from .groups import Partition, by_pixels, idle_share, propose

Count = Annotated[int, Interval(ge=0, lt=2**63)]


def _check_row(row: tuple[list[str], list[float | None]]) -> tuple[list[str], list[float | None]]:
    if len(row[1]) != len(row[0]) + 1:
        raise ValueError("wanted a sum for each name, and how often they were added")
    return row


Row = Annotated[
    tuple[list[str], list[float | None]],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),  # JSON has lists only
    AfterValidator(_check_row),
]
"""Names, the sum of each, and the number of additions; null = a non-finite number, which JSON lacks."""


class MetricMeansState(TypedDict):
    """Sums of one rank, or of several one after another."""

    rows: list[Row]


class NonFiniteState(TypedDict):
    """Numbers of skipped steps."""

    total: Count  # of the whole run
    recent: Count  # since the last reading
    in_a_row: Count  # up to now
    longest: Count  # in a row since the last reading
    losses: dict[str, Count]  # how often each of the rank's losses was not finite since the last reading


@final
class MetricMeans:
    """Means of scalar tensors between two log steps; only reading them waits for the device."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, ...], Tensor] = {}  # [n + 1]: sums of n scalars, number of additions

    def add(self, values: Mapping[str, Tensor], fine: Tensor | None = None) -> None:
        """Add one step's scalars, unless `fine` ([] bool) is False: a skipped step."""
        names = tuple(values)
        scalars = [value.detach().double() for value in values.values()]
        row = torch.stack([*scalars, torch.ones_like(scalars[0])])
        if fine is not None:
            row = torch.where(fine, row, torch.zeros_like(row))
        if names in self._rows:
            row = self._rows[names].to(row.device) + row  # loaded ones lie on the CPU
        self._rows[names] = row

    def read(self, group: Ranks) -> dict[str, float]:
        """Return the means since the last reading over steps and the ranks that have them, and reset."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for rows in group.gather_objects([(names, row.tolist()) for names, row in self._rows.items()]):
            for names, (*values, count) in rows:
                for name, value in zip(names, values, strict=True):
                    sums[name] = sums.get(name, 0.0) + value
                    counts[name] = counts.get(name, 0.0) + count
        self._rows = {}
        return {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}

    def state_dict(self) -> MetricMeansState:
        """Return the sums as plain numbers, for an exact resume."""
        rows = {names: row.tolist() for names, row in self._rows.items()}
        return {
            "rows": [
                (list(names), [value if math.isfinite(value) else None for value in row])
                for names, row in rows.items()
            ]
        }

    def load_state_dict(self, state: MetricMeansState) -> None:
        """Restore one rank's sums, or add up those of several ranks."""
        self._rows = {}
        for names, values in state["rows"]:
            numbers = [math.nan if value is None else value for value in values]
            row, key = torch.tensor(numbers, dtype=torch.float64), tuple(names)
            self._rows[key] = self._rows[key] + row if key in self._rows else row


class SkippedSteps(NamedTuple):
    """How many optimizer steps were skipped, and which losses were not finite."""

    total: int  # of the whole run
    recent: int  # since the last reading
    names: tuple[str, ...]  # non-finite losses in those, such as "clip/spatial"; () = only a gradient

    def describe(self) -> str:
        """Describe the recent skipped steps in a line for the log."""
        steps = "1 step was" if self.recent == 1 else f"{self.recent} steps were"
        what = ", ".join(self.names) or "a gradient of finite losses"
        return f"{steps} left out, not finite: {what}"


@final
class NonFiniteMonitor:
    """Count optimizer steps skipped because of NaN or Inf; only reading the counts waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(4, dtype=torch.long, device=device)  # as in the first four of the state
        self._losses: dict[tuple[str, ...], Tensor] = {}  # [n]: how often each of n losses was not finite

    def update(self, fine: Tensor, losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Count a step: skipped unless `fine` ([] bool), and those of its losses that are not finite."""
        bad = (~fine).long()
        total, recent, in_a_row, longest = self._counts.unbind()
        in_a_row = (in_a_row + 1) * bad
        self._counts = torch.stack((total + bad, recent + bad, in_a_row, torch.maximum(longest, in_a_row)))
        for scalars in losses:
            names = tuple(scalars)
            counts = (~torch.isfinite(torch.stack(list(scalars.values())))).long()
            self._losses[names] = self._losses[names] + counts if names in self._losses else counts

    def check(self, step: int, most: int) -> None:
        """Check that fewer than `most` steps in a row were skipped since the last reading.

        Raises:
            RadioError: `most` or more were.
        """
        longest = int(self._counts[3])
        if longest >= most:
            names = ", ".join(self._names()) or "elsewhere than in this rank's losses"
            raise RadioError(
                f"step {step}: {longest} steps in a row were left out, not finite: {names}; what was saved "
                f"last stands. Begin anew with --restart and a lower --optim.lr, or raise "
                f"--max-nonfinite-steps"
            )

    def check_any(self, steps: int) -> None:
        """Check that not all `steps` of a run were skipped: it may be too short for `check` to notice.

        Raises:
            RadioError: all were skipped.
        """
        if int(self._counts[0]) == steps:
            raise RadioError(
                f"all of the {steps} steps were left out, losses or gradients not being finite (the log "
                f"names them); nothing was learned. Begin anew with --restart and a lower --optim.lr"
            )

    def read(self, group: Ranks, step: int, most: int) -> SkippedSteps:
        """Return the steps skipped since the last reading, and reset.

        Raises:
            RadioError: `most` or more steps in a row were skipped.
        """
        self.check(step, most)
        total, recent, in_a_row, _ = self._counts.tolist()
        names = dict.fromkeys(name for local in group.gather_objects(self._names()) for name in local)
        self._counts = torch.tensor([total, 0, in_a_row, in_a_row], device=self._device)
        self._losses = {}
        return SkippedSteps(total, recent, tuple(names))

    def state_dict(self) -> NonFiniteState:
        """Return the counts as plain numbers, for an exact resume."""
        total, recent, in_a_row, longest = self._counts.tolist()
        return {
            "total": total,
            "recent": recent,
            "in_a_row": in_a_row,
            "longest": longest,
            "losses": self._nonfinite_losses(),
        }

    def load_state_dict(self, state: NonFiniteState) -> None:
        """Restore what `state_dict` returned."""
        counts = [state["total"], state["recent"], state["in_a_row"], state["longest"]]
        self._counts = torch.tensor(counts, device=self._device)
        losses = state["losses"]
        self._losses = {tuple(losses): torch.tensor(list(losses.values()), device=self._device)}

    def _names(self) -> list[str]:
        return [name for name, count in self._nonfinite_losses().items() if count]

    def _nonfinite_losses(self) -> dict[str, int]:
        sums: dict[str, int] = {}
        for names, counts in self._losses.items():
            for name, count in zip(names, counts.tolist(), strict=True):
                sums[name] = sums.get(name, 0) + count
        return sums


def first_bad(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor with a NaN or an infinity, or an empty string. One host sync.

    Of sharded tensors only this rank's part is checked.
    """
    floats = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    if not floats:
        return ""
    fine = torch.stack([torch.isfinite(tensor).all() for tensor in floats.values()]).tolist()
    return next((name for name, good in zip(floats, fine, strict=True) if not good), "")


Phase = Literal["data", "teachers", "forward", "backward", "communication", "optimiser"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_BUSY: tuple[Phase, ...] = ("teachers", "forward", "backward")


class Times(NamedTuple):
    """Seconds per step."""

    phases: dict[str, float]
    groups: dict[str, float]  # that one rank is busy for the group; overlaps are split evenly


class _Span(NamedTuple):
    phase: Phase
    group: str
    start: Any  # a CUDA event, or seconds
    end: Any


@final
class PhaseTimer:
    """Times the code inside `time`, in any thread; on a GPU by CUDA events.

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
        self._between: Callable[[Any, Any], float] = _elapsed if on_gpu else lambda start, end: end - start
        self._origin: Any = None  # common origin for all threads and streams
        self._spans: list[_Span] = []
        self._ready: Any = None  # time of the last gradient
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

    def read(self, steps: int, waited: float = 0.0) -> Times:
        """Return the means over the steps since the last reading, and reset; the only host sync.

        `waited` are the seconds that the host waited for data in these steps.
        """
        spans, self._spans = self._spans, []
        phases: dict[str, float] = {**dict.fromkeys(PHASES, 0.0), "data": waited / steps}
        edges: list[tuple[float, int, str]] = []  # when a group's work begins (1) and ends (-1)
        if self._origin is None and spans:
            self._origin = spans[0].start
        for span in spans:
            seconds = self._between(span.start, span.end)
            phases[span.phase] += seconds / steps
            if span.group and span.phase in _BUSY:
                start = self._between(self._origin, span.start)
                edges += [(start, 1, span.group), (start + seconds, -1, span.group)]
        groups = {group: 0.0 for _, _, group in edges}
        depth = dict.fromkeys(groups, 0)
        before = 0.0
        for now, change, group in sorted(edges):
            working = [name for name in depth if depth[name]]
            for name in working:
                groups[name] += (now - before) / len(working) / steps
            depth[group] += change
            before = now
        return Times(phases, groups)

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
    return Times(phases, {name: sum(seconds) / len(seconds) for name, seconds in groups.items()})


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@final
class PerformanceMonitor:
    """Speed, time per phase, idle ranks and utilisation between two log steps; every rank calls all methods.

    Args:
        config: the run's settings.
        partition: the groups of teachers and their ranks.
        group: all ranks.
        device: this rank's device.
        last: the student's weights that get their gradients last.
    """

    def __init__(
        self,
        config: TrainConfig,
        partition: Partition,
        group: Ranks,
        device: torch.device,
        last: Iterable[nn.Parameter],
    ) -> None:
        self.partition, self.group = partition, group
        self.watch = PhaseTimer(device, last)
        self._peak = config.peak_tflops
        self._flops = 0  # of a step, over all ranks
        if config.peak_tflops and group.leads:
            from .plan import step_flops  # imported late: it sets up the run's models as the trainer does

            self._flops = step_flops(config, partition)
        self._groups: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Begin the interval of the next reading."""
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def step(self, waited: float) -> None:
        """Count one step that waited so many seconds for its images."""
        self._waited += waited
        self._steps += 1

    def skip(self, seconds: float) -> None:
        """Exclude so many seconds, in which no step was done."""
        self._start += seconds

    def read(self) -> dict[str, float]:
        """Return the log's performance figures since the last reading, and reset; the only host sync.

        `time/PHASE` is in seconds per step, the mean over ranks; `perf/step_time/GROUP` is the time that one
        rank of a group is busy for it, with `perf/images_per_rank/GROUP` images; `perf/idle_fraction` is the
        share of all ranks' time spent waiting for the slowest group; `mfu` is the share of the devices' peak,
        including the teachers' operations.
        """
        seconds, waited, steps = time.perf_counter() - self._start, self._waited, self._steps
        self.start()
        times = mean_times(self.group.gather_objects(self.watch.read(steps, waited)))
        self._groups = times.groups
        figures = {
            "images_per_second": steps * self.partition.batch_size / seconds,
            "data_wait": min(waited / seconds, 1.0),  # a wait may have started before the interval
            "seconds": seconds,
            **{f"time/{phase}": value for phase, value in times.phases.items()},
            **{f"perf/step_time/{name}": value for name, value in times.groups.items()},
            **{f"perf/images_per_rank/{group.name}": group.share for group in self.partition.groups},
            "perf/idle_fraction": idle_share(self.partition, by_pixels(self.partition.groups, times.groups)),
        }
        if self._peak is not None and self._flops:
            figures["mfu"] = steps * self._flops / (seconds * self.group.world * self._peak * 1e12)
        return figures

    def in_words(self) -> str:
        """Describe the imbalance at the last log step and a better split; empty where all ranks are alike."""
        groups = self.partition.groups
        if not self._groups or self.partition.in_turns:
            return ""
        times = ", ".join(f"{group.name} {self._groups[group.name]:.3g} s a step" for group in groups)
        seconds = by_pixels(groups, self._groups)
        idle = f"ranks are idle {idle_share(self.partition, seconds):.0%} of the time"
        better = propose(self.partition, seconds)
        if better is None:
            return f"{times}; {idle}"
        split = " ".join(map(str, better.split))
        return (
            f"{times}; {idle}; --ranks-per-group {split} would take {better.after:.3g} s instead of "
            f"{better.before:.3g}"
        )

"""How fast a run goes, where its time goes, and how busy it keeps its ranks and their devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import nn

from evals.core.dist import Group

from .config import TrainConfig
from .cost import count, outline
from .imbalance import idle_share, propose
from .metrics import Clock
from .partition import Partition
from .stopwatch import Stopwatch, mean_times


@final
class Pace:
    """Times a run from one log step to the next. Every rank calls every method.

    Args:
        config: the run's settings.
        partition: which rank does what.
        group: all ranks.
        device: where this one computes.
        last: weights of the student that get their gradients last.
    """

    def __init__(
        self,
        config: TrainConfig,
        partition: Partition,
        group: Group,
        device: torch.device,
        last: Iterable[nn.Parameter],
    ) -> None:
        self.partition, self.group = partition, group
        self.clock, self.watch = Clock(), Stopwatch(device, last)
        self._peak = config.peak_tflops
        self._flops = step_flops(config, partition) if config.peak_tflops and group.leads else 0
        self._seconds: dict[str, float] = {}

    def step(self, waited: float) -> None:
        """Count one step that waited so many seconds for its pictures."""
        self.clock.step(waited)
        self.watch.waited(waited)

    def read(self) -> dict[str, float]:
        """The figures of the log since the last reading, which this ends; the only host sync.

        `time/PHASE` are seconds a step, the mean over ranks; `seconds/GROUP` those that one rank of a group
        is busy for it, with `share/GROUP` pictures; `idle` is the share of all ranks' time spent on waiting
        for the slowest group; `mfu` the share of the devices' peak, the teachers' operations counted.
        """
        lap = self.clock.read()
        times = mean_times(self.group.gather_objects(self.watch.read(lap.steps)))
        self._seconds = times.groups
        pictures = lap.steps * self.partition.batch_size
        used = {}
        if self._peak is not None and self._flops:
            used["mfu"] = lap.steps * self._flops / (lap.seconds * self.group.world * self._peak * 1e12)
        return {
            "images_per_second": pictures / lap.seconds,
            "data_wait": min(lap.waiting / lap.seconds, 1.0),  # a wait may have begun in the lap before
            "seconds": lap.seconds,
            **times.record(),
            **{f"share/{group.name}": group.share for group in self.partition.groups},
            "idle": idle_share(self.partition, self._seconds),
            **used,
        }

    def in_words(self) -> str:
        """The imbalance at the last log step, and a better split; empty where all ranks do the same."""
        groups = self.partition.groups
        if not self._seconds or all(group.ranks == groups[0].ranks for group in groups):
            return ""
        parts = [f"{group.name} {self._seconds[group.name]:.3g} s a step" for group in groups]
        line = (
            f"{', '.join(parts)}; ranks are idle {idle_share(self.partition, self._seconds):.0%} of the time"
        )
        if (better := propose(self.partition, self._seconds)) is None:
            return line
        split = " ".join(map(str, better.split))
        return f"{line}; --split {split} would take {better.after:.3g} s instead of {better.before:.3g}"


def step_flops(config: TrainConfig, partition: Partition) -> int:
    """Operations of a step over all ranks; a few seconds for small students."""
    models = outline(config)
    costs = {group: count(config, models, group, half=False, standing=True) for group in partition.groups}
    return sum(len(group.ranks) * cost.flops for group, cost in costs.items())

"""Performance of a run: speed, time per phase, idle ranks and the devices' utilisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import nn

from radio.dist import Group

from .config import TrainConfig
from .cost import count, outline
from .imbalance import idle_share, propose
from .metrics import Clock
from .partition import Partition
from .stopwatch import Stopwatch, mean_times


@final
class PerformanceMonitor:
    """Times a run from one log step to the next. Every rank calls every method.

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
        """Count one step that waited so many seconds for its images."""
        self.clock.step(waited)
        self.watch.waited(waited)

    def read(self) -> dict[str, float]:
        """Return the log's performance figures since the last reading, and reset; the only host sync.

        `time/PHASE` is in seconds per step, the mean over ranks; `perf/step_time/GROUP` is the time that one
        rank of a group is busy for it, with `perf/images_per_rank/GROUP` images; `perf/idle_fraction` is the
        share of all ranks' time spent waiting for the slowest group; `mfu` is the share of the devices' peak,
        including the teachers' operations.
        """
        lap = self.clock.read()
        times = mean_times(self.group.gather_objects(self.watch.read(lap.steps)))
        self._seconds = times.groups
        images = lap.steps * self.partition.batch_size
        used = {}
        if self._peak is not None and self._flops:
            used["mfu"] = lap.steps * self._flops / (lap.seconds * self.group.world * self._peak * 1e12)
        return {
            "images_per_second": images / lap.seconds,
            "data_wait": min(lap.waiting / lap.seconds, 1.0),  # a wait may have started in the previous lap
            "seconds": lap.seconds,
            **times.record(),
            **{f"perf/images_per_rank/{group.name}": group.share for group in self.partition.groups},
            "perf/idle_fraction": idle_share(self.partition, self._seconds),
            **used,
        }

    def in_words(self) -> str:
        """Describe the imbalance at the last log step and a better split; empty where all ranks are alike."""
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
        return (
            f"{line}; --ranks-per-group {split} would take {better.after:.3g} s instead of "
            f"{better.before:.3g}"
        )


def step_flops(config: TrainConfig, partition: Partition) -> int:
    """Count the operations of a step over all ranks; takes a few seconds for small students."""
    models = outline(config)
    costs = {group: count(config, models, group, half=False, standing=True) for group in partition.groups}
    return sum(len(group.ranks) * cost.flops for group, cost in costs.items())

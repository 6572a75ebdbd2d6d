"""Means of what a run measures between two log steps, kept on the device until they are read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from evals.core.dist import Group


class Meters:
    """Running sums of scalar tensors; reading them is the only host sync."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            held = self._sums.get(name)
            self._sums[name] = value.detach().double() if held is None else held + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, group: Group) -> dict[str, float]:
        """The means over steps and ranks since the last reading, which this ends."""
        if not self._sums:
            return {}
        sums = group.sum(torch.stack(list(self._sums.values())).cpu()).tolist()
        means = {
            name: total / (self._counts[name] * group.world)
            for name, total in zip(self._sums, sums, strict=True)
        }
        self._sums, self._counts = {}, {}
        return means

    def finite(self) -> bool:
        """Whether everything that was added since the last reading is finite."""
        return all(bool(torch.isfinite(total)) for total in self._sums.values())

    def state(self) -> dict[str, tuple[Tensor, int]]:
        """What an exact resume needs."""
        return {name: (total.cpu(), self._counts[name]) for name, total in self._sums.items()}

    def restore(self, state: Mapping[str, tuple[Tensor, int]], device: torch.device) -> None:
        """Take up what `state` gave."""
        self._sums = {name: total.to(device) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


class Lap(NamedTuple):
    """What a clock measured between two readings."""

    seconds: float
    waiting: float  # of the seconds, those spent on waiting for data
    steps: int


class Clock:
    """Seconds and steps since the last reading, and how much of it was waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waiting, self._steps = 0.0, 0

    def step(self, waited: float) -> None:
        """Count one step that waited so many seconds for the loader."""
        self._waiting += waited
        self._steps += 1

    def read(self) -> Lap:
        """The lap since the last reading, which this ends."""
        now = time.perf_counter()
        lap = Lap(now - self._start, self._waiting, self._steps)
        self._start, self._waiting, self._steps = now, 0.0, 0
        return lap

"""Means of what a run measures between two log steps, kept on the device until they are read."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor


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

    def read(self) -> dict[str, float]:
        """The means since the last reading, which this ends."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state(self) -> dict[str, tuple[Tensor, int]]:
        """What an exact resume needs."""
        return {name: (total.cpu(), self._counts[name]) for name, total in self._sums.items()}

    def restore(self, state: Mapping[str, tuple[Tensor, int]], device: torch.device) -> None:
        """Take up what `state` gave."""
        self._sums = {name: total.to(device) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


class Clock:
    """Seconds since the last reading, and how many of them went into waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waiting = 0.0

    def waited(self, seconds: float) -> None:
        """Count seconds spent waiting for the loader."""
        self._waiting += seconds

    def read(self) -> tuple[float, float]:
        """(seconds, of them waiting) since the last reading, which this ends."""
        now = time.perf_counter()
        result = now - self._start, self._waiting
        self._start, self._waiting = now, 0.0
        return result

"""Means of a run's measurements between two log steps, accumulated on the device until they are read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple

import torch
from pydantic import AfterValidator
from torch import Tensor

from radio.dist import Group

from .guards import FromList

Rows = dict[tuple[str, ...], Tensor]


def _check_row(row: tuple[list[str], list[float | None]]) -> tuple[list[str], list[float | None]]:
    if len(row[1]) != len(row[0]) + 1:
        raise ValueError("wanted a sum for each name, and how often they were added")
    return row


Row = Annotated[tuple[list[str], list[float | None]], FromList, AfterValidator(_check_row)]
"""Names, the sum of each, and the number of additions; null = a non-finite number, which JSON lacks."""


class Meters:
    """Running sums of scalar tensors; reading them is the only host sync."""

    def __init__(self) -> None:
        self._rows: Rows = {}  # [n + 1] each: the sums of n scalars, and the number of additions

    def add(self, values: Mapping[str, Tensor], fine: Tensor | None = None) -> None:
        """Add one step's scalars, unless `fine` ([] bool) is False: a skipped step."""
        names = tuple(values)
        scalars = [value.detach().double() for value in values.values()]
        row = torch.stack([*scalars, torch.ones_like(scalars[0])])
        if fine is not None:
            row = torch.where(fine, row, torch.zeros_like(row))
        held = self._rows.get(names)
        self._rows[names] = row if held is None else held + row

    def read(self, group: Group) -> dict[str, float]:
        """Return the means since the last reading over steps and the ranks that have them, and reset."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for rows in group.gather_objects([(names, row.tolist()) for names, row in self._rows.items()]):
            for names, row in rows:
                for name, value in zip(names, row, strict=False):
                    sums[name] = sums.get(name, 0.0) + value
                    counts[name] = counts.get(name, 0.0) + row[-1]
        self._rows = {}
        return {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}

    def state(self) -> list[Row]:
        """Return the state that an exact resume needs, as plain numbers."""
        return [
            (list(names), [value if math.isfinite(value) else None for value in row.tolist()])
            for names, row in self._rows.items()
        ]

    def restore(self, state: Iterable[Row], device: torch.device) -> None:
        """Restore what `state` returned, or the concatenation of what it returned on several ranks."""
        self._rows = {}
        for names, values in state:
            numbers = [math.nan if value is None else value for value in values]
            row = torch.tensor(numbers, dtype=torch.float64, device=device)
            key = tuple(names)
            self._rows[key] = self._rows[key] + row if key in self._rows else row


class Lap(NamedTuple):
    """Times of a clock between two readings."""

    seconds: float
    waiting: float  # part of the seconds spent waiting for data
    steps: int


class Clock:
    """Seconds and steps since the last reading, and the time spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waiting, self._steps = 0.0, 0

    def step(self, waited: float) -> None:
        """Count one step that waited so many seconds for the loader."""
        self._waiting += waited
        self._steps += 1

    def skip(self, seconds: float) -> None:
        """Exclude so many seconds, in which no step was done."""
        self._start += seconds

    def read(self) -> Lap:
        """Return the lap since the last reading, and start the next."""
        now = time.perf_counter()
        lap = Lap(now - self._start, self._waiting, self._steps)
        self._start, self._waiting, self._steps = now, 0.0, 0
        return lap

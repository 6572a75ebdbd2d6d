"""A step's pictures on one rank, group by group, with the teachers' features of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from radio.types import Features

from .config import TrainConfig
from .crops import Crop, Pictures, RandomCrops, rows_of
from .partition import Partition, TeacherGroup
from .sampling import StepSampler

# Letters: B pictures of a group on this rank.

Teach = Callable[[TeacherGroup, Tensor], dict[str, Features]]


class Lesson(NamedTuple):
    """One group's pictures on this rank, and its teachers' features of them."""

    group: TeacherGroup
    images: Tensor  # [B, 3, side, side] in [0, 1], on the device
    targets: dict[str, Features]


class Batch(NamedTuple):
    """One step's lessons on this rank."""

    lessons: tuple[Lesson, ...]
    broken: int
    waited: float  # seconds


class GroupedCrops(Dataset[Crop]):
    """The endless stream of crops, each as large as the largest model of its group sees it.

    Args:
        pictures: where they come from.
        config: crop settings and seed of the run.
        partition: which group each position of a step belongs to.
        sides: pixels of the square crops of each group.
    """

    def __init__(
        self, pictures: Pictures, config: TrainConfig, partition: Partition, sides: Sequence[int]
    ) -> None:
        crops = {side: RandomCrops(pictures, config.data, side, config.seed) for side in set(sides)}
        self._crops = [
            crops[side]
            for group, side in zip(partition.groups, sides, strict=True)
            for _ in range(group.batch_size)
        ]

    def __getitem__(self, position: int) -> Crop:
        """The crop at a position of the stream."""
        return self._crops[position % len(self._crops)][position]


def crop_sides(partition: Partition, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """The side in pixels of each group's crops: the largest of its student's and its teachers' inputs."""
    return tuple(
        max(group.side, *(max(sizes[name]) for name in group.teachers)) for group in partition.groups
    )


def load(
    dataset: Dataset[Any],
    config: TrainConfig,
    partition: Partition,
    rank: int,
    start: int,
    device: torch.device,
) -> Iterator[list[Any]]:
    """The rows of the steps from `start` on: of each group that the rank works for, its pictures collated.

    The loader's processes start in the calling thread: one forked by a pool's thread ends with an error.
    """
    mine = partition.of(rank)
    rows = [row for group in mine for row in partition.rows(group, rank)]
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(start, config.steps, partition.batch_size, rows),
        num_workers=config.data.workers,
        collate_fn=_Collate([group.share for group in mine]),
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if config.data.workers else None,
    )
    return rows_of(iter(loader))


def taught(
    rows: Iterator[list[Any]], groups: Sequence[TeacherGroup], device: torch.device, teach: Teach
) -> Iterator[Batch]:
    """The batches that the rows of online crops make, with what the teachers say of each group's."""
    for step, waited in _timed(rows):
        images = [_scaled(row.pixels, device) for row in step]
        lessons = tuple(
            Lesson(group, seen, teach(group, seen)) for group, seen in zip(groups, images, strict=True)
        )
        yield Batch(lessons, sum(int(row.broken.sum()) for row in step), waited)


def remembered(
    rows: Iterator[list[Any]],
    groups: Sequence[TeacherGroup],
    device: torch.device,
    recall: Callable[[Any, Any, torch.device], dict[str, Features]],
) -> Iterator[Batch]:
    """The batches that the rows of a teacher cache make."""
    for step, waited in _timed(rows):
        lessons = []
        for group, row in zip(groups, step, strict=True):
            known = recall(row.summaries, row.tokens, device)
            targets = {name: known[name] for name in group.teachers}
            lessons.append(Lesson(group, _scaled(row.pixels, device), targets))
        yield Batch(tuple(lessons), 0, waited)


def _timed(rows: Iterator[list[Any]]) -> Iterator[tuple[list[Any], float]]:
    """Each row with the seconds that it was waited for."""
    while True:
        start = time.perf_counter()
        row = next(rows, None)
        waited = time.perf_counter() - start
        if row is None:
            return
        yield row, waited


def _scaled(pixels: Tensor, device: torch.device) -> Tensor:
    return pixels.to(device, non_blocking=True).float().div_(255)


class _Collate:
    """Collates so many samples, then so many: one row for each group. A class, so that workers may get it."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)

    def __call__(self, samples: list[Any]) -> list[Any]:
        rows, first = [], 0
        for count in self.counts:
            rows.append(default_collate(samples[first : first + count]))
            first += count
        return rows

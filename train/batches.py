"""Batches: a step's images on one rank, per group of teachers, with the teachers' features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from radio.resample import resize_images
from radio.types import Features

from .config import TrainConfig
from .data.stream import Mark, Rows, make_room_for_files, rows_of
from .partition import Partition, TeacherGroup
from .preempt import outlast_signals
from .sampling import StepSampler

# Letters: B images of a group on this rank.

T = TypeVar("T")
Teach = Callable[[TeacherGroup, Tensor], dict[str, Features]]

_READ_AHEAD = 4  # steps per loader process


class GroupBatch(NamedTuple):
    """One group's images on this rank with its teachers' features."""

    group: TeacherGroup
    images: Tensor  # [B, 3, side, side] in [0, 1], on the device, at the student's resolution
    targets: dict[str, Features]


class Batch(NamedTuple):
    """One step's images and targets on this rank."""

    lessons: tuple[GroupBatch, ...]
    marks: tuple[Mark, ...]  # position in the data after each; empty with a cache
    waited: float  # seconds


def crop_sides(partition: Partition, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """Return the side of each group's crops in pixels: the largest input of its student and teachers."""
    return tuple(
        max(group.side, *(max(sizes[name]) for name in group.teachers)) for group in partition.groups
    )


def load(
    caches: Dataset[Any],
    config: TrainConfig,
    partition: Partition,
    rank: int,
    start: int,
    device: torch.device,
) -> Iterator[list[Any]]:
    """Load the rows of teacher caches from step `start` on, collated for each of the rank's groups.

    Worker processes start in the calling thread: one forked from a pool's thread would fail.
    """
    mine = partition.of(rank)
    tensors = sum(1 + 2 * len(group.teachers) for group in mine)  # each needs an open file
    make_room_for_files(config.data.workers * _READ_AHEAD * tensors)
    rows = [row for group in mine for row in partition.rows(group, rank)]
    loader = DataLoader(
        caches,
        batch_sampler=StepSampler(start, config.steps, partition.batch_size, rows),
        num_workers=config.data.workers,
        collate_fn=_Collate([group.share for group in mine]),
        pin_memory=device.type == "cuda",
        worker_init_fn=outlast_signals,
        prefetch_factor=_READ_AHEAD if config.data.workers else None,
    )
    return rows_of(iter(loader))


def online_batches(
    rows: Iterator[tuple[Rows, ...]], groups: Sequence[TeacherGroup], device: torch.device, teach: Teach
) -> Iterator[Batch]:
    """Yield batches from rows of online crops, with the teachers' features for each group."""
    for step, waited in _timed(rows):
        images = [_scaled(row.pixels, device) for row in step]
        lessons = tuple(
            GroupBatch(group, _for_student(seen, group), teach(group, seen))
            for group, seen in zip(groups, images, strict=True)
        )
        yield Batch(lessons, tuple(row.mark for row in step), waited)


def cached_batches(
    rows: Iterator[list[Any]],
    groups: Sequence[TeacherGroup],
    device: torch.device,
    recall: Callable[[Any, Any, torch.device], dict[str, Features]],
) -> Iterator[Batch]:
    """Yield batches from the rows of a teacher cache."""
    for step, waited in _timed(rows):
        lessons = []
        for group, row in zip(groups, step, strict=True):
            known = recall(row.summaries, row.tokens, device)
            targets = {name: known[name] for name in group.teachers}
            lessons.append(GroupBatch(group, _for_student(_scaled(row.pixels, device), group), targets))
        yield Batch(tuple(lessons), (), waited)


def _timed(rows: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Yield each row with the seconds spent waiting for it."""
    while True:
        start = time.perf_counter()
        row = next(rows, None)
        waited = time.perf_counter() - start
        if row is None:
            return
        yield row, waited


def _scaled(pixels: Tensor, device: torch.device) -> Tensor:
    return pixels.to(device, non_blocking=True).float().div_(255)


def _for_student(images: Tensor, group: TeacherGroup) -> Tensor:
    """Resize crops to the student's resolution: done here, since batches are prefetched."""
    return resize_images(images, (group.side, group.side))


class _Collate:
    """Collate consecutive runs of samples into one row per group; a class, so that it can be pickled."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)

    def __call__(self, samples: list[Any]) -> list[Any]:
        rows, first = [], 0
        for count in self.counts:
            rows.append(default_collate(samples[first : first + count]))
            first += count
        return rows

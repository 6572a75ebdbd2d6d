"""A step's pictures on one rank, group by group, with the teachers' features of them."""

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

# Letters: B pictures of a group on this rank.

T = TypeVar("T")
Teach = Callable[[TeacherGroup, Tensor], dict[str, Features]]

_READ_AHEAD = 4  # steps of each loader process


class Lesson(NamedTuple):
    """One group's pictures on this rank, and its teachers' features of them."""

    group: TeacherGroup
    images: Tensor  # [B, 3, side, side] in [0, 1], on the device, as the student sees them
    targets: dict[str, Features]


class Batch(NamedTuple):
    """One step's lessons on this rank."""

    lessons: tuple[Lesson, ...]
    marks: tuple[Mark, ...]  # where the data stand after each; none from a cache
    waited: float  # seconds


def crop_sides(partition: Partition, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """The side in pixels of each group's crops: the largest of its student's and its teachers' inputs."""
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
    """The rows of teacher caches for the steps from `start` on: of each of the rank's groups, collated.

    The loader's processes start in the calling thread: one forked by a pool's thread ends with an error.
    """
    mine = partition.of(rank)
    tensors = sum(1 + 2 * len(group.teachers) for group in mine)  # each is a file between processes
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


def taught(
    rows: Iterator[tuple[Rows, ...]], groups: Sequence[TeacherGroup], device: torch.device, teach: Teach
) -> Iterator[Batch]:
    """The batches that the rows of online crops make, with what the teachers say of each group's."""
    for step, waited in _timed(rows):
        images = [_scaled(row.pixels, device) for row in step]
        lessons = tuple(
            Lesson(group, _for_student(seen, group), teach(group, seen))
            for group, seen in zip(groups, images, strict=True)
        )
        yield Batch(lessons, tuple(row.mark for row in step), waited)


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
            lessons.append(Lesson(group, _for_student(_scaled(row.pixels, device), group), targets))
        yield Batch(tuple(lessons), (), waited)


def _timed(rows: Iterator[T]) -> Iterator[tuple[T, float]]:
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


def _for_student(images: Tensor, group: TeacherGroup) -> Tensor:
    """The crops as large as the student sees them: here, since batches are made ahead of the step."""
    return resize_images(images, (group.side, group.side))


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

"""Partition: which ranks run which teachers, on which images of a step.

Teachers with the same batch size and student resolution form a group: they see the same images and share the
student's forward (paper §4: CLIP and DINOv2 at 224 px, SAM at 1024 px). A step's images are the groups'
batches concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import or_
from typing import NamedTuple

from radio.errors import ConfigError

from .config import TeacherConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherGroup:
    """Teachers that see the same images, and the group's ranks."""

    teachers: tuple[str, ...]
    side: int  # the student's input side in pixels
    batch_size: int  # images per step over the group's ranks
    first: int  # offset of its images in a step's batch
    ranks: tuple[int, ...]  # with shared placement: all ranks, for every group

    @property
    def name(self) -> str:
        """Name of the group from its teachers, such as `clip+dino`."""
        return "+".join(self.teachers)

    @property
    def share(self) -> int:
        """Images per step of one of its ranks."""
        return self.batch_size // len(self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The groups of a run with their ranks."""

    groups: tuple[TeacherGroup, ...]
    world: int

    @property
    def batch_size(self) -> int:
        """Images per step over all groups."""
        return sum(group.batch_size for group in self.groups)

    def of(self, rank: int) -> tuple[TeacherGroup, ...]:
        """Return the groups of a rank, in order."""
        return tuple(group for group in self.groups if rank in group.ranks)

    def rows(self, group: TeacherGroup, rank: int) -> range:
        """Return the positions in a step's batch of the images of one of the group's ranks."""
        assert rank in group.ranks, "only the group's own ranks take its images"
        first = group.first + group.ranks.index(rank) * group.share
        return range(first, first + group.share)


def teacher_groups(config: TrainConfig) -> tuple[TeacherGroup, ...]:
    """Group the teachers, in the order of each group's first; all groups have rank 0 only, as in one process.

    Raises:
        ConfigError: a teacher has a batch of less than one image.
    """
    members: dict[tuple[int, int], list[str]] = {}
    for teacher in config.teachers:
        members.setdefault(_seen(teacher, config), []).append(teacher.name)
    groups, first = [], 0
    for (size, side), names in members.items():
        groups.append(
            TeacherGroup(teachers=tuple(names), side=side, batch_size=size, first=first, ranks=(0,))
        )
        first += size
    return tuple(groups)


def make_partition(config: TrainConfig, world: int, costs: Sequence[float] | None = None) -> Partition:
    """Assign ranks to the groups: all ranks to each, or a number each that divides the group's batch.

    The numbers are `ranks_per_group`, or by default those whose slowest group is fastest.

    Args:
        config: teachers, batch sizes, `teacher_placement` and `ranks_per_group`.
        world: number of ranks; a single one always has all groups.
        costs: a rank's cost of one image of each group, in any unit (default: its pixels).

    Raises:
        ConfigError: the ranks cannot share a batch evenly, there are fewer ranks than groups, or
            `ranks_per_group` does not fit groups, batches or ranks.
    """
    groups = teacher_groups(config)
    if config.ranks_per_group:
        split = _checked(config, groups, world)
    elif world == 1 or config.teacher_placement == "shared":
        return _in_turns(groups, world)
    else:
        prices = [float(group.side**2) for group in groups] if costs is None else costs
        split = best_split(groups, world, prices)
    dealt, first = [], 0
    for group, count in zip(groups, split, strict=True):
        dealt.append(replace(group, ranks=tuple(range(first, first + count))))
        first += count
    return Partition(groups=tuple(dealt), world=world)


def best_split(groups: Sequence[TeacherGroup], world: int, costs: Sequence[float]) -> tuple[int, ...]:
    """Find each group's number of ranks that makes the slowest group fastest, then the second, and so on.

    `costs` are a rank's costs of one image of each group.

    Raises:
        ConfigError: no divisors of the groups' batches add up to `world`.
    """
    sizes = [group.batch_size for group in groups]
    if (best := _best(tuple(sizes), tuple(costs), world)) is None:
        raise ConfigError(_impossible(groups, world))
    return best.split


def _seen(teacher: TeacherConfig, config: TrainConfig) -> tuple[int, int]:
    """Return a teacher's images per step and the student's input side for it."""
    size = config.batch_size if teacher.batch_size is None else teacher.batch_size
    if size < 1:
        raise ConfigError(f"teacher {teacher.name} cannot see {size} images a step; give 1 or more")
    return size, teacher.student_resolution or config.resolution


def _in_turns(groups: Sequence[TeacherGroup], world: int) -> Partition:
    for group in groups:
        if group.batch_size % world:
            raise ConfigError(
                f"a batch of {group.batch_size} cannot be shared evenly by {world} ranks "
                f"({group.name}); give a batch size that they divide"
            )
    return Partition(groups=tuple(replace(group, ranks=tuple(range(world))) for group in groups), world=world)


class _Split(NamedTuple):
    """Ranks of some groups, and each group's cost per rank, in descending order."""

    loads: tuple[float, ...]
    split: tuple[int, ...]


def _best(sizes: tuple[int, ...], costs: tuple[float, ...], world: int) -> _Split | None:
    """Find the best split of `world` ranks that divides every batch evenly; None where there is none.

    By dynamic programming: the best split contains the best one of every suffix of the groups.
    """
    counts = [_divisors(size, world) for size in sizes]

    @cache
    def best_of(place: int, ranks: int) -> _Split | None:
        size, cost = sizes[place], costs[place]
        if place == len(sizes) - 1:
            return None if ranks < 1 or size % ranks else _Split((size / ranks * cost,), (ranks,))
        found: _Split | None = None
        for count in counts[place]:
            if count > ranks - (len(sizes) - 1 - place):
                break
            if (rest := best_of(place + 1, ranks - count)) is not None:
                loads = tuple(sorted((size / count * cost, *rest.loads), reverse=True))
                if found is None or loads < found.loads:
                    found = _Split(loads, (count, *rest.split))
        return found

    return best_of(0, world)


def _divisors(size: int, most: int) -> list[int]:
    """Return the divisors of a batch up to `most`, in order."""
    return [count for count in range(1, min(size, most) + 1) if size % count == 0]


def _checked(config: TrainConfig, groups: Sequence[TeacherGroup], world: int) -> tuple[int, ...]:
    split = config.ranks_per_group
    asked = f"--ranks-per-group {' '.join(map(str, split))}"
    if config.teacher_placement == "shared":
        raise ConfigError(f"{asked} deals ranks to groups, and in turns all work for all; leave one of both")
    if len(split) != len(groups):
        names = ", ".join(group.name for group in groups)
        raise ConfigError(f"{asked} is for {len(split)} groups; this run has {len(groups)}: {names}")
    if sum(split) != world:
        raise ConfigError(
            f"{asked} is for {sum(split)} ranks, and there are {world}; leave it out or mend it"
        )
    for group, count in zip(groups, split, strict=True):
        if count < 1 or group.batch_size % count:
            raise ConfigError(
                f"{asked}: a batch of {group.batch_size} cannot be shared evenly "
                f"by {count} ranks ({group.name})"
            )
    return split


def _impossible(groups: Sequence[TeacherGroup], world: int) -> str:
    """Explain why no split fits."""
    if len(groups) == 1:
        return (
            f"a batch of {groups[0].batch_size} cannot be shared evenly by {world} ranks "
            f"({groups[0].name}); give a batch size that they divide"
        )
    if world < len(groups):
        names = ", ".join(group.name for group in groups)
        return (
            f"{len(groups)} groups of teachers ({names}) need a rank each, and there are {world}; "
            f"let all ranks work for all groups with --teacher-placement shared, or start more"
        )
    sizes = [group.batch_size for group in groups]
    batches = " and ".join(f"{group.batch_size} ({group.name})" for group in groups)
    return (
        f"{world} ranks cannot be shared: no numbers of ranks that divide the batches of {batches} "
        f"add up to {world}; start {_possible(sizes, world)} ranks, or change a batch size"
    )


def _possible(sizes: Sequence[int], world: int) -> str:
    """Format the nearest possible numbers of ranks, below and above."""
    sums = 1  # bit n: n ranks can be shared by the batches so far
    for size in sizes:
        sums = reduce(or_, (sums << count for count in _divisors(size, size)))
    below, above = sums & ((1 << world) - 1), sums >> (world + 1)
    nearest = [below.bit_length() - 1] if below else []
    nearest += [world + (above & -above).bit_length()] if above else []
    return " or ".join(map(str, nearest))

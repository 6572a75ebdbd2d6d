"""Which ranks work for which teachers, and on which pictures of a step.

Teachers of one batch size beside one student resolution form a group: they see the same pictures and share
the student's forward (paper §4: CLIP and DINOv2 at 224 px, SAM at 1024 px). A step's pictures are the groups'
batches one after another.
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
    """Teachers that see the same pictures, and the ranks that work for them."""

    teachers: tuple[str, ...]
    side: int  # the student's input side in pixels
    batch_size: int  # pictures a step over the group's ranks
    first: int  # where its pictures begin in a step's batch
    ranks: tuple[int, ...]  # in turns: every rank of the world, for every group

    @property
    def name(self) -> str:
        """Its teachers in one word, as in `clip+dino`."""
        return "+".join(self.teachers)

    @property
    def share(self) -> int:
        """Pictures a step of one of its ranks."""
        return self.batch_size // len(self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The groups of a run and the ranks that they are dealt to."""

    groups: tuple[TeacherGroup, ...]
    world: int

    @property
    def batch_size(self) -> int:
        """Pictures a step over all groups."""
        return sum(group.batch_size for group in self.groups)

    def of(self, rank: int) -> tuple[TeacherGroup, ...]:
        """The groups that a rank works for, in order."""
        return tuple(group for group in self.groups if rank in group.ranks)

    def rows(self, group: TeacherGroup, rank: int) -> range:
        """Where in a step's batch the pictures lie that a rank of the group takes."""
        assert rank in group.ranks, "only the group's own ranks take its pictures"
        first = group.first + group.ranks.index(rank) * group.share
        return range(first, first + group.share)


def teacher_groups(config: TrainConfig) -> tuple[TeacherGroup, ...]:
    """The groups in the order of their first teachers, as one process has them: rank 0 works for all.

    Raises:
        ConfigError: a teacher with a batch of less than one picture.
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
    """The groups with the ranks of each: all of them in turns, or a share that divides the group's batch.

    Among the possible shares it is the setting's `split`, or else the one whose slowest group is fastest.

    Args:
        config: teachers, batch sizes, `partition` and `split`.
        world: how many ranks there are; one process always takes turns.
        costs: what one picture of each group costs a rank, in any unit; its pixels unless given.

    Raises:
        ConfigError: a batch that the ranks cannot share evenly, fewer ranks than groups, or a `split` that
            does not fit groups, batches or ranks.
    """
    groups = teacher_groups(config)
    if config.split:
        split = _checked(config, groups, world)
    elif world == 1 or config.partition == "turns":
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
    """The ranks of each group with the fastest slowest group, then the fastest second one, and so on.

    `costs` are what one picture of each group costs a rank.

    Raises:
        ConfigError: no numbers of ranks that divide the groups' batches add up to `world`.
    """
    sizes = [group.batch_size for group in groups]
    if (best := _best(tuple(sizes), tuple(costs), world)) is None:
        raise ConfigError(_impossible(groups, world))
    return best.split


def _seen(teacher: TeacherConfig, config: TrainConfig) -> tuple[int, int]:
    """Pictures a step of a teacher, and the student's side beside it."""
    size = config.batch_size if teacher.batch_size is None else teacher.batch_size
    if size < 1:
        raise ConfigError(f"teacher {teacher.name} cannot see {size} pictures a step; give 1 or more")
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
    """Ranks of some groups, and what each group's pictures then cost a rank, the dearest first."""

    loads: tuple[float, ...]
    split: tuple[int, ...]


def _best(sizes: tuple[int, ...], costs: tuple[float, ...], world: int) -> _Split | None:
    """The best way to deal `world` ranks to batches so that each is shared evenly; None where there is none.

    The best way for all holds the best one for every rest of them, so that each rest is worked out once.
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
    """The divisors of a batch up to `most`, in order."""
    return [count for count in range(1, min(size, most) + 1) if size % count == 0]


def _checked(config: TrainConfig, groups: Sequence[TeacherGroup], world: int) -> tuple[int, ...]:
    split = config.split
    asked = f"--split {' '.join(map(str, split))}"
    if config.partition == "turns":
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
    """Why no split fits."""
    if len(groups) == 1:
        return (
            f"a batch of {groups[0].batch_size} cannot be shared evenly by {world} ranks "
            f"({groups[0].name}); give a batch size that they divide"
        )
    if world < len(groups):
        names = ", ".join(group.name for group in groups)
        return (
            f"{len(groups)} groups of teachers ({names}) need a rank each, and there are {world}; "
            f"let all ranks work for all groups with --partition turns, or start more"
        )
    sizes = [group.batch_size for group in groups]
    batches = " and ".join(f"{group.batch_size} ({group.name})" for group in groups)
    return (
        f"{world} ranks cannot be shared: no numbers of ranks that divide the batches of {batches} "
        f"add up to {world}; start {_possible(sizes, world)} ranks, or change a batch size"
    )


def _possible(sizes: Sequence[int], world: int) -> str:
    """The nearest numbers of ranks, below and above, that can be shared."""
    sums = 1  # bit n: n ranks can be shared by the batches so far
    for size in sizes:
        sums = reduce(or_, (sums << count for count in _divisors(size, size)))
    below, above = sums & ((1 << world) - 1), sums >> (world + 1)
    nearest = [below.bit_length() - 1] if below else []
    nearest += [world + (above & -above).bit_length()] if above else []
    return " or ".join(map(str, nearest))

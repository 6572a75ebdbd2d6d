"""Groups of teachers: which ranks run which teachers on which images, and how evenly that splits the work.

Teachers with the same batch size and student resolution form a group: they see the same images and share the
student's forward (paper §4: CLIP and DINOv2 at 224 px, SAM at 1024 px). With several resolutions a group
draws one for every step. A step's images are the groups' batches concatenated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from radio.errors import ConfigError, DataError

from .config import SidesConfig, TeacherConfig, TrainConfig
from .data.crops import generator, seed_of
from .loggers import read_records

TeacherSizes: TypeAlias = Mapping[str, Mapping[int, tuple[int, int]]]
"""The input (height, width) of each teacher in pixels, by its name and the student's side."""
SideSeconds: TypeAlias = Mapping[str, Mapping[int, float]]
"""The seconds of a step on one rank of each group, by its name and the student's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherGroup:
    """Teachers that see the same images, and the group's ranks."""

    teachers: tuple[str, ...]
    adaptors: tuple[str, ...]  # that of each teacher
    sides: tuple[int, ...]  # the student's input sides in pixels, one of which is drawn for every step
    weights: tuple[float, ...] = ()  # how often each is drawn; () = equally often
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

    @property
    def side_shares(self) -> dict[int, float]:
        """The share of the steps at each side."""
        weights = self.weights or (1.0,) * len(self.sides)
        shares = dict.fromkeys(self.sides, 0.0)
        for side, weight in zip(self.sides, weights, strict=True):
            shares[side] += weight / sum(weights)
        return shares

    def side_at(self, seed: int, step: int) -> int:
        """Draw the student's side in a step, equal on all ranks; groups draw independently of each other."""
        if len(self.sides) == 1:
            return self.sides[0]
        drawn = generator(seed_of(seed, "resolution", step), "resolution", self.first)
        shares = self.side_shares
        return list(shares)[int(torch.multinomial(torch.tensor(list(shares.values())), 1, generator=drawn))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The groups of a run with their ranks."""

    groups: tuple[TeacherGroup, ...]
    world: int

    @property
    def batch_size(self) -> int:
        """Images per step over all groups."""
        return sum(group.batch_size for group in self.groups)

    @property
    def in_turns(self) -> bool:
        """Whether every rank works for all groups, in turns."""
        return all(group.ranks == self.groups[0].ranks for group in self.groups)

    def crop_sides(self, sizes: TeacherSizes) -> tuple[dict[int, int], ...]:
        """Return the side of each group's crops in pixels, by the student's side.

        It is the largest input of student and teachers.
        """
        return tuple(
            {side: max(side, *(max(sizes[name][side]) for name in group.teachers)) for side in group.sides}
            for group in self.groups
        )

    def of(self, rank: int) -> tuple[TeacherGroup, ...]:
        """Return the groups of a rank, in order."""
        return tuple(group for group in self.groups if rank in group.ranks)

    def peers(self, rank: int) -> tuple[TeacherGroup, ...]:
        """Return the groups that share adaptors with a rank's, directly or through others, in order.

        Their ranks hold the same adaptors. Without `TeacherConfig.adaptor` they are the rank's own groups.
        """
        names = {name for group in self.of(rank) for name in group.adaptors}
        while True:
            near = tuple(g for g in self.groups if not names.isdisjoint(g.adaptors) or rank in g.ranks)
            more = {name for group in near for name in group.adaptors}
            if more == names:
                return near
            names = more

    def rows(self, group: TeacherGroup, rank: int) -> range:
        """Return the positions in a step's batch of the images of one of the group's ranks."""
        assert rank in group.ranks, "only the group's own ranks take its images"
        first = group.first + group.ranks.index(rank) * group.share
        return range(first, first + group.share)


def teacher_groups(config: TrainConfig) -> tuple[TeacherGroup, ...]:
    """Group the teachers of one batch size and resolution, ordered by their first in the settings.

    The groups have rank 0 only; `make_partition` deals out the ranks.

    Raises:
        ConfigError: a teacher has a batch of less than one image.
    """
    members: dict[_Seen, list[TeacherConfig]] = {}
    for teacher in config.teachers:
        members.setdefault(_seen(teacher, config), []).append(teacher)
    groups, first = [], 0
    for seen, teachers in members.items():
        groups.append(
            TeacherGroup(
                teachers=tuple(t.name for t in teachers),
                adaptors=tuple(t.adaptor_name for t in teachers),
                **seen._asdict(),
                first=first,
                ranks=(0,),
            )
        )
        first += seen.batch_size
    return tuple(groups)


def make_partition(config: TrainConfig, world: int) -> Partition:
    """Assign ranks to the groups: all ranks to each, or a number each that divides the group's batch.

    The numbers are `ranks_per_group`, or by default those with the shortest steps if an image costs its
    pixels.

    Args:
        config: teachers, batch sizes, `teacher_placement` and `ranks_per_group`.
        world: number of ranks; a single one always has all groups.

    Raises:
        ConfigError: the ranks cannot share a batch evenly, there are fewer ranks than groups,
            `ranks_per_group` does not fit groups, batches or ranks, or `grad_accum_steps` does not divide a
            rank's images.
    """
    groups = teacher_groups(config)
    everyone = tuple(range(world))
    if not config.ranks_per_group and (world == 1 or config.teacher_placement == "shared"):
        for group in groups:
            if group.batch_size % world:
                raise ConfigError(_uneven(group, world))
        assigned = [replace(group, ranks=everyone) for group in groups]
    else:
        if config.ranks_per_group:
            split = _check_split(config, groups, world)
        else:
            split = best_split(groups, world, [[side**2 for side in group.sides] for group in groups])
        assigned, first = [], 0
        for group, count in zip(groups, split, strict=True):
            assigned.append(replace(group, ranks=everyone[first : first + count]))
            first += count
    for group in assigned:
        if group.share % config.grad_accum_steps:
            raise ConfigError(
                f"--grad-accum-steps {config.grad_accum_steps} does not divide the {group.share} images of a "
                f"step that a rank takes for {group.name}; give a number that does"
            )
    return Partition(groups=tuple(assigned), world=world)


def _uneven(group: TeacherGroup, world: int) -> str:
    return (
        f"a batch of {group.batch_size} cannot be shared evenly by {world} ranks "
        f"({group.name}); give a batch size that they divide"
    )


def best_split(
    groups: Sequence[TeacherGroup], world: int, costs: Sequence[Sequence[float]]
) -> tuple[int, ...]:
    """Find each group's number of ranks that makes steps shortest on average.

    A step takes as long as its slowest group (see `mean_slowest`). Of equal splits of groups that have one
    side each, that with the faster second group is taken, then third, and so on.

    Args:
        groups: which batches are to be shared.
        world: number of ranks.
        costs: a rank's costs of one image of each group, at each of the group's sides.

    Raises:
        ConfigError: no divisors of the groups' batches add up to `world`.
    """
    sizes = [group.batch_size for group in groups]
    means = [_mean(group, each) for group, each in zip(groups, costs, strict=True)]
    if (best := _best(tuple(sizes), tuple(means), world)) is None:
        raise ConfigError(_impossible(groups, world))
    if all(len(each) == 1 for each in costs):
        return best.split
    return _best_of_draws(tuple(groups), world, tuple(map(tuple, costs)), best.split)


def mean_slowest(groups: Sequence[TeacherGroup], costs: Sequence[Sequence[float]]) -> float:
    """Compute the mean of the slowest group's cost; each group draws its side by itself.

    Args:
        groups: the groups.
        costs: of a step on one rank of each group, at each of the group's sides.
    """
    shares = [list(group.side_shares.values()) for group in groups]
    mean = below = 0.0
    for cost in sorted({cost for each in costs for cost in each}):
        within = math.prod(  # the share of the steps in which no group costs more
            sum(share for other, share in zip(*pair, strict=True) if other <= cost)
            for pair in zip(costs, shares, strict=True)
        )
        mean += cost * (within - below)
        below = within
    return mean


@cache
def _best_of_draws(
    groups: tuple[TeacherGroup, ...], world: int, costs: tuple[tuple[float, ...], ...], split: tuple[int, ...]
) -> tuple[int, ...]:
    """Search for the split with the least `mean_slowest`, from one that is near it."""

    def loads(counts: Sequence[int]) -> list[list[float]]:
        shared = zip(groups, costs, counts, strict=False)  # of the first groups
        return [[cost * group.batch_size / count for cost in each] for group, each, count in shared]

    best, least = split, mean_slowest(groups, loads(split))
    divisors = [_divisors(group.batch_size, world) for group in groups]
    means = [_mean(group, each) for group, each in zip(groups, costs, strict=True)]

    def search(counts: tuple[int, ...], ranks: int) -> None:
        nonlocal best, least
        chosen = len(counts)
        if chosen and (cost := mean_slowest(groups[:chosen], loads(counts))) >= least:
            return  # further groups only add to it
        if chosen == len(groups):
            if not ranks:
                best, least = counts, cost
            return
        # Each of the others needs as many ranks as keep its own mean below the least so far.
        needed = [
            max(1, math.ceil(means[index] * groups[index].batch_size / least * (1 - _TOLERANCE)))
            for index in range(chosen, len(groups))
        ]
        most = ranks - sum(needed[1:])
        for count in divisors[chosen]:
            if needed[0] <= count <= most and (chosen + 1 < len(groups) or count == ranks):
                search((*counts, count), ranks - count)

    search((), world)
    return best


def _mean(group: TeacherGroup, costs: Sequence[float]) -> float:
    """Compute the mean over the sides that are drawn."""
    return sum(share * cost for share, cost in zip(group.side_shares.values(), costs, strict=True))


class _Seen(NamedTuple):
    """What a teacher sees: teachers that see the same form a group."""

    batch_size: int  # images per step
    sides: tuple[int, ...]  # of the student
    weights: tuple[float, ...]


def _seen(teacher: TeacherConfig, config: TrainConfig) -> _Seen:
    size = config.batch_size if teacher.batch_size is None else teacher.batch_size
    if size < 1:
        raise ConfigError(f"teacher {teacher.name} cannot see {size} images a step; give 1 or more")
    return _Seen(size, *student_sides(teacher, config))


def sees_run_sides(teacher: TeacherConfig) -> bool:
    """Check whether the student sees a teacher's images at the run's sides, not at the teacher's own."""
    return teacher.student_resolution is None and teacher.student_resolutions == SidesConfig()


def student_sides(teacher: TeacherConfig, config: TrainConfig) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the student's input sides in pixels for a teacher, and how often each is drawn; () = equally.

    Raises:
        ConfigError: one resolution and several contradict each other, a side is given twice, or there are
            other than one weight for each side.
    """
    several, option = teacher.student_resolutions, f"teacher {teacher.name}: student-resolutions"
    if several.sides and teacher.student_resolution is not None:
        raise ConfigError(f"{option} has no effect beside student-resolution; leave one of both out")
    if teacher.student_resolution is not None and not several.weights:
        return (teacher.student_resolution,), ()
    if sees_run_sides(teacher):
        several, option = config.resolutions, "--resolutions"
    sides, weights = several.sides, several.weights
    if weights and len(weights) != len(sides):
        raise ConfigError(
            f"{option}: {len(weights)} weights for {len(sides)} sides; give a weight for every side, or none"
        )
    if len(set(sides)) < len(sides):
        raise ConfigError(
            f"{option}.sides {' '.join(map(str, sides))}: one is given twice; give it a weight instead"
        )
    return sides or (config.resolution,), weights if len(sides) > 1 else ()


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
    def best_of(index: int, ranks: int) -> _Split | None:
        size, cost = sizes[index], costs[index]
        if index == len(sizes) - 1:
            return None if ranks < 1 or size % ranks else _Split((size / ranks * cost,), (ranks,))
        best: _Split | None = None
        for count in counts[index]:
            if count > ranks - (len(sizes) - 1 - index):
                break
            if (rest := best_of(index + 1, ranks - count)) is not None:
                loads = tuple(sorted((size / count * cost, *rest.loads), reverse=True))
                if best is None or loads < best.loads:
                    best = _Split(loads, (count, *rest.split))
        return best

    return best_of(0, world)


def _divisors(size: int, most: int) -> list[int]:
    """Return the divisors of a batch up to `most`, in order."""
    return [count for count in range(1, min(size, most) + 1) if size % count == 0]


def _check_split(config: TrainConfig, groups: Sequence[TeacherGroup], world: int) -> tuple[int, ...]:
    split = config.ranks_per_group
    option = f"--ranks-per-group {' '.join(map(str, split))}"
    if config.teacher_placement == "shared":
        raise ConfigError(f"{option} deals ranks to groups, and in turns all work for all; leave one of both")
    if len(split) != len(groups):
        names = ", ".join(group.name for group in groups)
        raise ConfigError(f"{option} is for {len(split)} groups; this run has {len(groups)}: {names}")
    if sum(split) != world:
        raise ConfigError(
            f"{option} is for {sum(split)} ranks, and there are {world}; leave it out or mend it"
        )
    for group, count in zip(groups, split, strict=True):
        if count < 1 or group.batch_size % count:
            raise ConfigError(
                f"{option}: a batch of {group.batch_size} cannot be shared evenly "
                f"by {count} ranks ({group.name})"
            )
    return split


def _impossible(groups: Sequence[TeacherGroup], world: int) -> str:
    """Explain why no split fits."""
    if len(groups) == 1:
        return _uneven(groups[0], world)
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


_TOLERANCE = 1e-9  # relative, of sums of a few numbers
_SHORTEST = 1e-12  # seconds per step, and images: no run is below, or above the inverse


class Proposal(NamedTuple):
    """Another split of the ranks, and the time of a step with the current and the new one."""

    split: tuple[int, ...]  # ranks of each group
    before: float  # mean seconds per step of the slowest group
    after: float


def idle_shares(partition: Partition, seconds: SideSeconds) -> dict[str, float]:
    """Compute each group's share of a step spent waiting for the slowest: in [0, 1), by the group's name.

    With shared placement no rank waits, and `seconds` may be empty.
    """
    groups = partition.groups
    if partition.in_turns:
        return {group.name: 0.0 for group in groups}
    step = step_seconds(partition, seconds)
    return {group.name: 1 - _mean(group, list(seconds[group.name].values())) / step for group in groups}


def idle_share(partition: Partition, seconds: SideSeconds) -> float:
    """Compute the share of all ranks' time spent waiting for the slowest group; see `idle_shares`."""
    idle = idle_shares(partition, seconds)
    weights = {group.name: len(group.ranks) for group in partition.groups}
    return sum(idle[name] * count for name, count in weights.items()) / sum(weights.values())


def by_pixels(groups: Sequence[TeacherGroup], seconds: Mapping[str, float]) -> SideSeconds:
    """Spread the groups' mean seconds over their sides, in proportion to the student's pixels.

    Groups without seconds are left out.
    """
    return {
        group.name: {
            side: seconds[group.name] * side**2 / _mean(group, [each**2 for each in group.sides])
            for side in group.sides
        }
        for group in groups
        if group.name in seconds
    }


def step_seconds(partition: Partition, seconds: SideSeconds) -> float:
    """Compute the mean seconds of a step: of the slowest group, or of all groups where ranks share them."""
    costs = [list(seconds[group.name].values()) for group in partition.groups]
    if partition.in_turns:
        return sum(_mean(group, each) for group, each in zip(partition.groups, costs, strict=True))
    return mean_slowest(partition.groups, costs)


def propose(partition: Partition, seconds: SideSeconds) -> Proposal | None:
    """Propose the split with the shortest steps, if they are shorter than the partition's.

    A group's seconds are taken to be proportional to its images per rank. None with shared placement, and
    where no split is faster.
    """
    groups = partition.groups
    if partition.in_turns:
        return None
    prices = [[each / group.share for each in seconds[group.name].values()] for group in groups]
    split = best_split(groups, partition.world, prices)
    loads = [
        [price * group.batch_size / count for price in each]
        for each, group, count in zip(prices, groups, split, strict=True)
    ]
    before, after = step_seconds(partition, seconds), mean_slowest(groups, loads)
    return Proposal(split, before, after) if after < before * (1 - _TOLERANCE) else None


def measured(path: Path, partition: Partition) -> dict[str, float]:
    """Read each group's seconds per step on one rank from `metrics.jsonl`, scaled to this partition.

    The mean over all records but the first, which includes the choice of kernels.

    Raises:
        DataError: there is no such file, or no record has the groups' times.
        ConfigError: the run had other groups of teachers.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; give the metrics.jsonl of a run of the same teachers")
    records = read_records(path)
    timed = [record for record in records if any(key.startswith("perf/step_time/") for key in record)]
    if not timed:
        raise DataError(f"{path}: no record times the groups of teachers (perf/step_time/GROUP)")
    seconds = {}
    for group in partition.groups:
        keys = (f"perf/step_time/{group.name}", f"perf/images_per_rank/{group.name}")
        if any(key not in record for key in keys for record in timed):
            known = sorted(
                key.removeprefix("perf/step_time/") for key in timed[0] if key.startswith("perf/step_time/")
            )
            raise ConfigError(f"{path}: times the groups {', '.join(known)}, and this run has {group.name}")
        prices = [_price(record[keys[0]], record[keys[1]], path) for record in timed[1:] or timed]
        seconds[group.name] = group.share * sum(prices) / len(prices)
    return seconds


def _price(seconds: object, share: object, path: Path) -> float:
    """Compute a rank's seconds per image."""
    if not isinstance(seconds, (int, float)) or not isinstance(share, (int, float)):
        raise DataError(
            f"{path}: wanted numbers for perf/step_time/GROUP and perf/images_per_rank/GROUP; is it a "
            f"run's log?"
        )
    if not (_SHORTEST < seconds < 1 / _SHORTEST and _SHORTEST < share < 1 / _SHORTEST):
        raise DataError(f"{path}: a group that takes {seconds} s for {share} images; is it a run's log?")
    return seconds / share

"""Lanes: a fixed number of independent streams through the data; their cursors suffice to resume a run.

A step's images are split over lanes, a contiguous block per lane; a rank takes contiguous images and
hence contiguous lanes, and its loader processes share those. Which images come, and in which order, depends
on the lanes only, not on ranks or workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from radio.dist import Group
from radio.errors import ConfigError

from ..config import TrainConfig
from ..partition import Partition, TeacherGroup
from ..sampling import seed_of
from .faults import ReadStats

# Letters: L lanes, S sources.

PLACE = 4  # numbers per cursor: unit, offset, seen, taken


class Sample(NamedTuple):
    """One decoded image, before cropping."""

    image: Tensor  # uint8 [3, H, W]
    key: str  # shard and name, or source and number


class SourceReader(Protocol):
    """One lane's reader of one source."""

    @property
    def place(self) -> tuple[int, int, int]:
        """The reader's position, from which it can resume."""

    def take(self, tally: ReadStats) -> Sample:
        """Read the next readable image and record faults in `tally`; raise DataError when none is left."""

    def close(self) -> None:
        """Close open files."""


class ShardStream:
    """One lane's stream over all sources, mixed by their weights.

    The source that is furthest behind its weight comes next, so no count is ever more than two images away
    from its share; lanes start with different credits, so that they do not all take the same source.

    Args:
        tracks: the lane's reader of each source.
        weights: the sources' weights, of any sum.
        taken: images taken from each source so far.
        seed: decides the credits.
    """

    def __init__(
        self, tracks: Sequence[SourceReader], weights: Sequence[float], taken: Sequence[int], seed: int
    ) -> None:
        self._tracks, self._taken = tracks, np.array(taken, np.int64)
        self._weights = np.array(weights) / sum(weights)
        self._credits = np.random.Generator(np.random.Philox(seed)).random(len(tracks))

    def take(self, tally: ReadStats) -> Sample:
        """Read the next image.

        Raises:
            DataError: the source that is due has no readable image left.
        """
        due = self._weights * (self._taken.sum() + 1) + self._credits - self._taken
        source = int(due.argmax())
        sample = self._tracks[source].take(tally)
        self._taken[source] += 1
        return sample

    def close(self) -> None:
        """Close open files."""
        for track in self._tracks:
            track.close()

    @property
    def cursor(self) -> Tensor:
        """The lane's cursor: int64 [S, 4]."""
        places = [(*track.place, int(n)) for track, n in zip(self._tracks, self._taken, strict=True)]
        return torch.tensor(places, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneAssignment:
    """How the images of one group's batch are split over lanes."""

    group: int  # index of the group in the run
    first: int  # offset of its images in a step's batch
    step: int  # images per step over all groups
    lanes: int
    each: int  # images per step of one lane

    def position(self, step: int, lane: int, number: int) -> int:
        """Return the position in the run of image `number` of a lane in a step."""
        return step * self.step + self.first + lane * self.each + number

    def seed(self, seed: int) -> int:
        """Return the seed of the group's order."""
        return seed_of(seed, "group", self.group)


def assign_lanes(config: TrainConfig, partition: Partition) -> tuple[LaneAssignment, ...]:
    """Assign lanes to every group: the largest divisor of its batch up to `num_streams`.

    Raises:
        ConfigError: `num_streams` is below 1, or ranks cannot share the lanes of their group evenly.
    """
    wanted = config.data.num_streams
    if wanted < 1:
        raise ConfigError(f"--data.num-streams {wanted} cannot be; give 1 or more")
    assignments = []
    for index, group in enumerate(partition.groups):
        lanes = largest_divisor(group.batch_size, wanted)
        if lanes % len(group.ranks):
            raise ConfigError(_unshared(group, lanes))
        assignments.append(
            LaneAssignment(
                group=index,
                first=group.first,
                step=partition.batch_size,
                lanes=lanes,
                each=group.batch_size // lanes,
            )
        )
    return tuple(assignments)


def lanes_of(assignment: LaneAssignment, partition: Partition, rank: int) -> range:
    """Return the lanes of a group that belong to one of its ranks."""
    group = partition.groups[assignment.group]
    rows = partition.rows(group, rank)
    return range((rows.start - group.first) // assignment.each, (rows.stop - group.first) // assignment.each)


def sharing(workers: int, counts: Sequence[int]) -> int:
    """Return the largest number of loader processes, up to `workers`, that share a rank's lanes evenly."""
    return next((n for n in range(workers, 0, -1) if all(count % n == 0 for count in counts)), 0)


def beginning(assignment: LaneAssignment, sources: int) -> Tensor:
    """Return the cursors of a group's lanes before the first image: int64 [L, S, 4]."""
    return torch.zeros(assignment.lanes, sources, PLACE, dtype=torch.int64)


def gathered(
    own: Sequence[Tensor | None],
    assignments: Sequence[LaneAssignment],
    partition: Partition,
    group: Group,
    sources: int,
) -> list[Tensor]:
    """Gather every group's cursors [L, S, 4] from all ranks; every rank calls it.

    Args:
        own: the cursors of this rank's lanes in each group; None for groups of other ranks.
        assignments: the lanes of every group.
        partition: the run's groups and ranks.
        group: the ranks.
        sources: number of sources.
    """
    whole = []
    for assignment, cursors in zip(assignments, own, strict=True):
        part = beginning(assignment, sources)
        if cursors is not None:
            lanes = lanes_of(assignment, partition, group.rank)
            part[lanes.start : lanes.stop] = cursors
        whole.append(group.sum(part))
    return whole


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number up to the limit."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def _unshared(group: TeacherGroup, lanes: int) -> str:
    ranks = len(group.ranks)
    return (
        f"the {lanes} streams of {group.name} cannot be shared evenly by {ranks} ranks; they are fixed for a "
        f"run, so start as many ranks as divide {lanes}, or begin anew with "
        f"--data.num-streams {group.batch_size}"
    )

"""Lanes: a fixed number of ways through the data, whose cursors are all that a resumed run needs.

A step's pictures are dealt to lanes, each lane's one after another; a rank takes contiguous pictures and
hence contiguous lanes, and its loader processes share those. Which pictures come, and in which order, is
decided by the lanes alone, whoever works for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from evals.core.dist import Group
from radio.errors import ConfigError

from ..config import TrainConfig
from ..partition import Partition, TeacherGroup
from ..sampling import seed_of
from .faults import Tally

# Letters: L lanes, S sources.

PLACE = 4  # numbers of a cursor: unit, offset, seen, taken


class Sample(NamedTuple):
    """One picture as it is stored."""

    image: Tensor  # uint8 [3, H, W]
    key: str  # shard and name, or source and number


class Track(Protocol):
    """One lane's way through one source."""

    @property
    def place(self) -> tuple[int, int, int]:
        """What it needs to go on from here."""

    def take(self, tally: Tally) -> Sample:
        """The next picture that can be read; what cannot is put down. DataError when nothing can."""

    def close(self) -> None:
        """Let go of what is open."""


class Lane:
    """One lane's way through all sources, each in its share.

    The source that is furthest behind its weight comes next, so that no count is ever more than two pictures
    away from its share; lanes begin with different credits, so that they do not all take the same one.

    Args:
        tracks: its way through each source.
        weights: the sources' shares, of any sum.
        taken: pictures that each has given so far.
        seed: decides the credits.
    """

    def __init__(
        self, tracks: Sequence[Track], weights: Sequence[float], taken: Sequence[int], seed: int
    ) -> None:
        self._tracks, self._taken = tracks, np.array(taken, np.int64)
        self._weights = np.array(weights) / sum(weights)
        self._credits = np.random.Generator(np.random.Philox(seed)).random(len(tracks))

    def take(self, tally: Tally) -> Sample:
        """The next picture.

        Raises:
            DataError: the source that it is to come from gives none any more.
        """
        due = self._weights * (self._taken.sum() + 1) + self._credits - self._taken
        source = int(due.argmax())
        sample = self._tracks[source].take(tally)
        self._taken[source] += 1
        return sample

    def close(self) -> None:
        """Let go of what is open."""
        for track in self._tracks:
            track.close()

    @property
    def cursor(self) -> Tensor:
        """int64 [S, 4]."""
        places = [(*track.place, int(n)) for track, n in zip(self._tracks, self._taken, strict=True)]
        return torch.tensor(places, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deal:
    """How the pictures of one group's batch are dealt to lanes."""

    group: int  # which of the run's groups
    first: int  # where its pictures begin in a step's batch
    step: int  # pictures of a step, of all groups
    lanes: int
    each: int  # pictures a step of one lane

    def position(self, step: int, lane: int, number: int) -> int:
        """Where picture `number` of a lane stands in the run."""
        return step * self.step + self.first + lane * self.each + number

    def seed(self, seed: int) -> int:
        """The seed of the group's own order."""
        return seed_of(seed, "group", self.group)


def deal_lanes(config: TrainConfig, partition: Partition) -> tuple[Deal, ...]:
    """The lanes of every group: the largest number up to the settings' that divides its batch.

    Raises:
        ConfigError: fewer than one lane, or ranks that cannot share the lanes of their group.
    """
    wanted = config.data.lanes
    if wanted < 1:
        raise ConfigError(f"--data.lanes {wanted} cannot be; give 1 or more")
    deals = []
    for index, group in enumerate(partition.groups):
        lanes = largest_divisor(group.batch_size, wanted)
        if lanes % len(group.ranks):
            raise ConfigError(_unshared(group, lanes))
        deals.append(
            Deal(
                group=index,
                first=group.first,
                step=partition.batch_size,
                lanes=lanes,
                each=group.batch_size // lanes,
            )
        )
    return tuple(deals)


def lanes_of(deal: Deal, partition: Partition, rank: int) -> range:
    """The lanes of a group that belong to one of its ranks."""
    group = partition.groups[deal.group]
    rows = partition.rows(group, rank)
    return range((rows.start - group.first) // deal.each, (rows.stop - group.first) // deal.each)


def sharing(workers: int, counts: Sequence[int]) -> int:
    """Loader processes: as many as asked for, or fewer where they could not share a rank's lanes evenly."""
    return next((n for n in range(workers, 0, -1) if all(count % n == 0 for count in counts)), 0)


def beginning(deal: Deal, sources: int) -> Tensor:
    """The cursors of a group's lanes before the first picture: int64 [L, S, 4]."""
    return torch.zeros(deal.lanes, sources, PLACE, dtype=torch.int64)


def gathered(
    own: Sequence[Tensor | None], deals: Sequence[Deal], partition: Partition, group: Group, sources: int
) -> list[Tensor]:
    """Every group's cursors [L, S, 4] from what each rank knows of its own lanes; every rank calls it.

    Args:
        own: the cursors of this rank's lanes in each group; None in the groups that it does not work for.
        deals: the run's.
        partition: the run's.
        group: the ranks.
        sources: how many sources the data have.
    """
    whole = []
    for deal, cursors in zip(deals, own, strict=True):
        part = beginning(deal, sources)
        if cursors is not None:
            lanes = lanes_of(deal, partition, group.rank)
            part[lanes.start : lanes.stop] = cursors
        whole.append(group.sum(part))
    return whole


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is no larger than the limit."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def _unshared(group: TeacherGroup, lanes: int) -> str:
    ranks = len(group.ranks)
    return (
        f"the {lanes} lanes of {group.name} cannot be shared evenly by {ranks} ranks; they are fixed for a "
        f"run, so start as many ranks as divide {lanes}, or begin anew with --data.lanes {group.batch_size}"
    )

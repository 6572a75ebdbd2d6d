"""Progress of a run through its data: the cursor of every lane, and what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, final

import torch
from annotated_types import Interval
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from radio.dist import Group
from radio.errors import CheckpointError
from radio.io import validate

from ..config import TrainConfig
from ..images import DatasetInfo
from ..partition import Partition
from .faults import CAUSES, SHARD_CAUSES, Cause, FaultList, ReadError, check_share, in_words
from .lanes import LaneAssignment, assign_lanes, beginning, gathered, lanes_of
from .sources import Sources
from .stream import Mark, Share

# Letters: L lanes of a group, S sources.


LISTING = "broken.jsonl"  # in the run folder


_Number = Annotated[int, Interval(ge=0, lt=2**48)]  # bytes, images, shards: no run has more


class DataState(TypedDict):
    """The state that `Progress.state` returns."""

    cursors: list[list[list[list[_Number]]]]  # for every group: [L, S, 4]
    counts: list[_Number]


_STATE = TypeAdapter(DataState)


def start_progress(
    config: TrainConfig, partition: Partition, group: Group, data: DatasetInfo, tell: Callable[[str], None]
) -> Progress:
    """Create the progress of a run before its first step; every rank calls it.

    Raises:
        ConfigError: ranks cannot share the lanes of their group.
        DataError: the path of the list of broken data is not a file.
    """
    listing = FaultList(config.out / LISTING, tell) if group.leads else None
    if group.leads:  # hashes folders of images; other ranks then read the stored hash
        _ = data.fingerprint
    group.barrier()
    sources = len(data) if isinstance(data, Sources) else 0
    assignments = assign_lanes(config, partition) if sources else ()
    return Progress(assignments, partition, group, sources, listing)


@final
class Progress:
    """One rank's progress, as of the last images trained on.

    Args:
        assignments: the lanes of every group; empty if the data are not a stream.
        partition: the run's groups and ranks.
        group: the ranks.
        sources: number of sources.
        listing: the list of broken data; on the first rank only.
    """

    def __init__(
        self,
        assignments: Sequence[LaneAssignment],
        partition: Partition,
        group: Group,
        sources: int,
        listing: FaultList | None,
    ) -> None:
        self._assignments, self._partition, self._group = assignments, partition, group
        self._own = [
            assignment for assignment in assignments if group.rank in partition.groups[assignment.group].ranks
        ]
        self._sources, self._listing = sources, listing
        self._new: list[ReadError] = []
        self._left_out = 0  # reports of shards with files of no sample
        self._counts = torch.zeros(len(CAUSES) + 1, dtype=torch.int64)  # the last: shards started
        self._told: dict[Cause, int] = {}
        self._listed = [0] * (len(CAUSES) + 1)  # counts when the list was last written
        self._cursors = [self._part(deal, beginning(deal, sources)) for deal in self._own]

    def shares(self, sides: Sequence[int]) -> list[Share]:
        """Return where this rank's lanes continue; `sides` are the crop sides of every group in pixels."""
        return [
            Share(
                assignment,
                lanes_of(assignment, self._partition, self._group.rank),
                sides[assignment.group],
                cursors,
            )
            for assignment, cursors in zip(self._own, self._cursors, strict=True)
        ]

    def add(self, marks: Sequence[Mark]) -> None:
        """Record a step's marks, one for each of this rank's groups."""
        self._cursors = [mark.cursors for mark in marks]
        for mark in marks:
            self._counts[-1] += mark.shards
            for fault in mark.faults:
                if fault.cause in CAUSES:
                    self._counts[CAUSES.index(fault.cause)] += 1
                else:
                    self._left_out += 1
            self._new += mark.faults

    def broken(self, seen: int, largest: float) -> dict[Cause, int]:
        """Count what could not be read so far, by cause, and list new faults. Every rank calls it.

        Args:
            seen: images trained on.
            largest: largest tolerated share of broken images, and of broken shards.

        Raises:
            DataError: the share is exceeded.
        """
        *totals, shards, left_out = self._group.sum(
            torch.tensor([*self._counts.tolist(), self._left_out])
        ).tolist()
        if [*totals, left_out] != self._listed:
            self._list_new()
        self._listed = [*totals, left_out]
        self._told = counts = dict(zip(CAUSES, totals, strict=True))
        check_share(counts["image"], seen + counts["image"], largest)
        check_share(sum(counts[cause] for cause in SHARD_CAUSES), shards, largest, "shards")
        return counts

    def in_words(self) -> str:
        """Format the last result of `broken`, such as `1 missing shards`; empty without any."""
        return in_words(self._told)

    def state(self) -> dict[str, Any]:
        """Return the state as plain data, independent of ranks and workers; every rank calls it."""
        own = {deal.group: cursors for deal, cursors in zip(self._own, self._cursors, strict=True)}
        parts = [own.get(assignment.group) for assignment in self._assignments]
        whole = gathered(parts, self._assignments, self._partition, self._group, self._sources)
        return {
            "cursors": [cursors.tolist() for cursors in whole],
            "counts": self._group.sum(self._counts).tolist(),
        }

    def restore(self, state: Any) -> None:
        """Restore what `state` returned.

        Raises:
            CheckpointError: it has other groups, lanes or sources, or is not such a state.
        """
        known = validate(_STATE, state, "the state's place in the data", error=CheckpointError)
        wanted = [tuple(beginning(assignment, self._sources).shape) for assignment in self._assignments]
        found = [_shape(cursors) for cursors in known["cursors"]]
        if len(known["counts"]) != len(self._counts):
            raise CheckpointError(
                f"the state counts {len(known['counts'])} kinds of broken data, wanted {len(self._counts)}; "
                f"it is of another version: go on with that one, or --restart to begin anew"
            )
        if found != wanted:
            raise CheckpointError(
                f"the state has cursors of {[list(shape or ()) for shape in found]} and this run of "
                f"{[list(shape) for shape in wanted]} (lanes, sources, numbers); "
                f"give the settings that it was saved with, or --restart to begin anew"
            )
        whole = [torch.tensor(cursors, dtype=torch.int64) for cursors in known["cursors"]]
        self._cursors = [
            self._part(deal, whole[place])
            for place, deal in enumerate(self._assignments)
            if deal in self._own
        ]
        if self._group.leads:  # so that the sum over ranks is unchanged
            self._counts = torch.tensor(known["counts"], dtype=torch.int64)
        if self._listing is not None:
            self._listing.check_names(sum(known["counts"][:-1]))

    def _part(self, assignment: LaneAssignment, whole: Tensor) -> Tensor:
        lanes = lanes_of(assignment, self._partition, self._group.rank)
        return whole[lanes.start : lanes.stop]

    def _list_new(self) -> None:
        parts = self._group.gather_objects(self._new)
        self._new = []
        if self._listing is not None:
            self._listing.add(fault for part in parts for fault in part)


def _shape(cursors: Any) -> tuple[int, ...] | None:
    """Return the shape [L, S, 4] of nested lists; None where they are uneven."""
    sizes: list[int] = []
    level = [cursors]
    for _ in range(3):
        counts = {len(part) for part in level}
        if len(counts) != 1:
            return None
        sizes += counts
        level = [inner for part in level for inner in part]
    return tuple(sizes)

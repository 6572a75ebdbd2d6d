"""How far a run has gone through its data: where every lane stands, and what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, final

import torch
from annotated_types import Interval
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from evals.core.dist import Group
from radio.errors import CheckpointError
from radio.io import validate

from ..config import TrainConfig
from ..partition import Partition
from ..pictures import Described
from .faults import CAUSES, SHARD_CAUSES, Cause, Fault, FaultList, check_share, in_words
from .lanes import Deal, beginning, deal_lanes, gathered, lanes_of
from .sources import Sources
from .stream import Mark, Share

# Letters: L lanes of a group, S sources.


LISTING = "broken.jsonl"  # in the run folder


_Number = Annotated[int, Interval(ge=0, lt=2**48)]  # bytes, pictures, shards: more are no run's


class DataState(TypedDict):
    """What `Progress.state` gives."""

    cursors: list[list[list[list[_Number]]]]  # of every group: [L, S, 4]
    counts: list[_Number]


_STATE = TypeAdapter(DataState)


def start_progress(
    config: TrainConfig, partition: Partition, group: Group, data: Described, tell: Callable[[str], None]
) -> Progress:
    """The progress of a run before its first step; every rank calls it.

    Raises:
        ConfigError: ranks that cannot share the lanes of their group.
        DataError: something else than a file is where broken data are to be named.
    """
    listing = FaultList(config.out / LISTING, tell) if group.leads else None
    if group.leads:  # hashes folders of pictures; the others then find the hash
        _ = data.fingerprint
    group.barrier()
    sources = len(data) if isinstance(data, Sources) else 0
    deals = deal_lanes(config, partition) if sources else ()
    return Progress(deals, partition, group, sources, listing)


@final
class Progress:
    """One rank's part of it, as of the last pictures that were learned from.

    Args:
        deals: the lanes of every group; none where the data are no stream.
        partition: the run's groups and ranks.
        group: the ranks.
        sources: how many sources the data have.
        listing: names what could not be read; on the first rank.
    """

    def __init__(
        self,
        deals: Sequence[Deal],
        partition: Partition,
        group: Group,
        sources: int,
        listing: FaultList | None,
    ) -> None:
        self._deals, self._partition, self._group = deals, partition, group
        self._own = [deal for deal in deals if group.rank in partition.groups[deal.group].ranks]
        self._sources, self._listing = sources, listing
        self._new: list[Fault] = []
        self._left_out = 0  # times that shards were said to hold more than their samples
        self._counts = torch.zeros(len(CAUSES) + 1, dtype=torch.int64)  # the last: shards begun
        self._told: dict[Cause, int] = {}
        self._listed = [0] * (len(CAUSES) + 1)  # the counts when the list was written last
        self._cursors = [self._part(deal, beginning(deal, sources)) for deal in self._own]

    def shares(self, sides: Sequence[int]) -> list[Share]:
        """What this rank's lanes are to go on with, given the sides of every group's crops."""
        return [
            Share(deal, lanes_of(deal, self._partition, self._group.rank), sides[deal.group], cursors)
            for deal, cursors in zip(self._own, self._cursors, strict=True)
        ]

    def add(self, marks: Sequence[Mark]) -> None:
        """Take down a step's marks, one for each of this rank's groups."""
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
        """How much could not be read so far, by cause; what is new goes into the list. Every rank calls it.

        Args:
            seen: pictures learned from.
            largest: the share of pictures, and of shards, that may be broken.

        Raises:
            DataError: more of them are.
        """
        *totals, shards, left_out = self._group.sum(
            torch.tensor([*self._counts.tolist(), self._left_out])
        ).tolist()
        if [*totals, left_out] != self._listed:
            self._list_new()
        self._listed = [*totals, left_out]
        self._told = counts = dict(zip(CAUSES, totals, strict=True))
        check_share(counts["picture"], seen + counts["picture"], largest)
        check_share(sum(counts[cause] for cause in SHARD_CAUSES), shards, largest, "shards")
        return counts

    def in_words(self) -> str:
        """What `broken` said last, such as `1 missing shards`; empty without any."""
        return in_words(self._told)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, whatever its ranks and workers, as plain data; every rank calls it."""
        own = {deal.group: cursors for deal, cursors in zip(self._own, self._cursors, strict=True)}
        parts = [own.get(deal.group) for deal in self._deals]
        whole = gathered(parts, self._deals, self._partition, self._group, self._sources)
        return {
            "cursors": [cursors.tolist() for cursors in whole],
            "counts": self._group.sum(self._counts).tolist(),
        }

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: it is of other groups, lanes or sources, or no such state.
        """
        known = validate(_STATE, state, "the state's place in the data", error=CheckpointError)
        wanted = [tuple(beginning(deal, self._sources).shape) for deal in self._deals]
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
            self._part(deal, whole[place]) for place, deal in enumerate(self._deals) if deal in self._own
        ]
        if self._group.leads:  # the sum over ranks is to be what it was
            self._counts = torch.tensor(known["counts"], dtype=torch.int64)
        if self._listing is not None:
            self._listing.check_names(sum(known["counts"][:-1]))

    def _part(self, deal: Deal, whole: Tensor) -> Tensor:
        lanes = lanes_of(deal, self._partition, self._group.rank)
        return whole[lanes.start : lanes.stop]

    def _list_new(self) -> None:
        parts = self._group.gather_objects(self._new)
        self._new = []
        if self._listing is not None:
            self._listing.add(fault for part in parts for fault in part)


def _shape(cursors: Any) -> tuple[int, ...] | None:
    """The shape [L, S, 4] of nested lists; None where they are uneven."""
    sizes: list[int] = []
    level = [cursors]
    for _ in range(3):
        counts = {len(part) for part in level}
        if len(counts) != 1:
            return None
        sizes += counts
        level = [inner for part in level for inner in part]
    return tuple(sizes)

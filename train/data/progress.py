"""How far a run has gone through its data: where every lane stands, and what could not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from evals.core.dist import Group
from radio.errors import CheckpointError

from ..config import TrainConfig
from ..partition import Partition
from ..pictures import Described
from .faults import CAUSES, SHARD_CAUSES, Cause, Fault, FaultList, check_share, in_words
from .lanes import Deal, beginning, deal_lanes, gathered, lanes_of
from .sources import Sources
from .stream import Mark, Share

# Letters: L lanes of a group, S sources.


LISTING = "broken.jsonl"  # in the run folder


def start_progress(config: TrainConfig, partition: Partition, group: Group, data: Described) -> Progress:
    """The progress of a run before its first step; every rank calls it.

    Raises:
        ConfigError: ranks that cannot share the lanes of their group.
    """
    if group.leads:  # hashes folders of pictures; the others then find the hash
        _ = data.fingerprint
    group.barrier()
    sources = len(data) if isinstance(data, Sources) else 0
    deals = deal_lanes(config, partition) if sources else ()
    return Progress(deals, partition, group, sources, config.out / LISTING)


@final
class Progress:
    """One rank's part of it, as of the last pictures that were learned from.

    Args:
        deals: the lanes of every group; none where the data are no stream.
        partition: the run's groups and ranks.
        group: the ranks.
        sources: how many sources the data have.
        listing: the file that names what could not be read.
    """

    def __init__(
        self, deals: Sequence[Deal], partition: Partition, group: Group, sources: int, listing: Path
    ) -> None:
        self._deals, self._partition, self._group = deals, partition, group
        self._own = [deal for deal in deals if group.rank in partition.groups[deal.group].ranks]
        self._sources, self._listing = sources, listing
        self._list: FaultList | None = None
        self._new: list[Fault] = []
        self._counts = torch.zeros(len(CAUSES) + 1, dtype=torch.int64)  # the last: shards begun
        self._told: dict[Cause, int] = {}
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
                self._counts[CAUSES.index(fault.cause)] += 1
            self._new += mark.faults

    def broken(self, seen: int, largest: float) -> dict[Cause, int]:
        """How much could not be read so far, by cause; what is new goes into the list. Every rank calls it.

        Args:
            seen: pictures learned from.
            largest: the share of pictures, and of shards, that may be broken.

        Raises:
            DataError: more of them are.
        """
        totals = self._group.sum(self._counts).tolist()
        counts = dict(zip(CAUSES, totals, strict=False))
        if counts != self._told:
            self._list_new()
        self._told = counts
        check_share(counts["picture"], seen + counts["picture"], largest)
        check_share(sum(counts[cause] for cause in SHARD_CAUSES), totals[-1], largest, "shards")
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

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: it is of other groups, lanes or sources.
        """
        whole = [torch.tensor(cursors, dtype=torch.int64) for cursors in state["cursors"]]
        wanted = [beginning(deal, self._sources).shape for deal in self._deals]
        if [cursors.shape for cursors in whole] != wanted:
            raise CheckpointError(
                f"the state has cursors of {[list(c.shape) for c in whole]} and this run of "
                f"{[list(shape) for shape in wanted]} (lanes, sources, numbers); "
                f"give the settings that it was saved with, or --restart to begin anew"
            )
        self._cursors = [
            self._part(deal, whole[place]) for place, deal in enumerate(self._deals) if deal in self._own
        ]
        if self._group.leads:  # the sum over ranks is to be what it was
            self._counts = torch.tensor(state["counts"], dtype=torch.int64)

    def _part(self, deal: Deal, whole: Tensor) -> Tensor:
        lanes = lanes_of(deal, self._partition, self._group.rank)
        return whole[lanes.start : lanes.stop]

    def _list_new(self) -> None:
        parts = self._group.gather_objects(self._new)
        self._new = []
        if self._group.leads:
            self._list = self._list or FaultList(self._listing)
            self._list.add(fault for part in parts for fault in part)

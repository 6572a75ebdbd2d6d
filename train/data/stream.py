"""The crops of a rank, step after step: its lanes shared by loader processes, read ahead of the trainer."""

from __future__ import annotations

import resource
import traceback
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from radio.errors import DataError, RadioError

from ..config import DataConfig
from ..crops import random_view
from ..preempt import outlast_signals
from .faults import Fault, Tally
from .lanes import Deal, Lane, sharing
from .sources import Sources

# Letters: B pictures of this rank, L its lanes, S sources.

T = TypeVar("T")

_OTHER_FILES = 512  # of a process: libraries, and what it shares with others
_READ_AHEAD = 4  # steps of each loader process
_TENSORS = 2  # of a group's rows; each is a file between processes


class Mark(NamedTuple):
    """Where lanes stand after some pictures, and what happened on the way to them."""

    cursors: Tensor  # int64 [L, S, 4]
    shards: int  # begun
    faults: tuple[Fault, ...]  # what could not be read


class Rows(NamedTuple):
    """A rank's pictures of one group in one step."""

    pixels: Tensor  # uint8 [B, 3, side, side]
    keys: tuple[str, ...]  # the samples' names
    mark: Mark


class Share(NamedTuple):
    """What a rank does for one group."""

    deal: Deal
    lanes: range
    side: int  # pixels of the square crops
    cursors: Tensor  # int64 [L, S, 4]


class LaneStream(IterableDataset[tuple[Rows, ...]]):
    """The crops of a rank for some steps, group by group; in a loader process only those of its lanes."""

    def __init__(
        self, sources: Sources, shares: Sequence[Share], config: DataConfig, seed: int, steps: range
    ) -> None:
        self.sources, self.shares, self.config, self.seed, self.steps = sources, shares, config, seed, steps

    def __iter__(self) -> Iterator[tuple[Rows, ...]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own = [self._open(share, worker, workers) for share in self.shares]
        make_room_for_files(len(self.sources) * sum(map(len, own)))
        try:
            for step in self.steps:
                yield tuple(
                    self._rows(share, lanes, step) for share, lanes in zip(self.shares, own, strict=True)
                )
        finally:
            for lane in chain.from_iterable(lanes.values() for lanes in own):
                lane.close()

    def _open(self, share: Share, worker: int, workers: int) -> dict[int, Lane]:
        count = len(share.lanes) // workers
        places = range(worker * count, (worker + 1) * count)
        return {
            share.lanes[n]: self.sources.lane(share.deal, share.lanes[n], share.cursors[n], self.seed)
            for n in places
        }

    def _rows(self, share: Share, lanes: dict[int, Lane], step: int) -> Rows:
        tally = Tally()
        pixels, keys = [], []
        for number, lane in lanes.items():
            for place in range(share.deal.each):
                sample = lane.take(tally)
                position = share.deal.position(step, number, place)
                pixels.append(random_view(sample.image, self.config, share.side, self.seed, position))
                keys.append(sample.key)
        cursors = torch.stack([lane.cursor for lane in lanes.values()])
        return Rows(torch.stack(pixels), tuple(keys), Mark(cursors, tally.shards, tuple(tally.faults)))


def open_stream(
    sources: Sources, shares: Sequence[Share], config: DataConfig, seed: int, steps: range, *, pin: bool
) -> Iterator[tuple[Rows, ...]]:
    """Each step's rows of a rank, for every group that it works for, in order.

    The loader's processes start in the calling thread, at once. There are fewer than asked for where they
    could not share the lanes evenly.

    Args:
        sources: the data.
        shares: the rank's lanes in each of its groups.
        config: crops and workers.
        seed: decides order and crops.
        steps: the steps to give.
        pin: put the pictures into page-locked memory, for a GPU.
    """
    workers = sharing(config.workers, [len(share.lanes) for share in shares])
    make_room_for_files(workers * _READ_AHEAD * _TENSORS * len(shares))
    loader = DataLoader(
        LaneStream(sources, shares, config, seed, steps),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=outlast_signals,
        prefetch_factor=_READ_AHEAD if workers else None,
    )
    return _steps(rows_of(iter(loader)), max(workers, 1), pin)


def make_room_for_files(count: int) -> None:
    """Let this process hold so many more files open at once, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def fewer_workers(wanted: int, shares: Sequence[Share]) -> str:
    """A line on why a rank has fewer loader processes than wanted; empty where it has as many."""
    lanes = [len(share.lanes) for share in shares]
    workers = sharing(wanted, lanes)
    if workers == wanted:
        return ""
    counts = " and ".join(map(str, lanes))
    return f"{workers} loader processes instead of {wanted}: they share the {counts} lanes of a rank evenly"


def rows_of(loader: Iterable[T]) -> Iterator[T]:
    """What a loader gives; an error of one of its processes comes as it was there, without a traceback in it.

    Raises:
        RadioError: a process met it, or has ended.
        OSError, MemoryError: a process met it.
    """
    try:
        yield from loader
    except (RadioError, OSError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold each other, and with them the processes
        text = str(error)
        if not text.startswith("Caught "):
            raise
        raise type(error)(text.rpartition(f"{type(error).__name__}: ")[2].strip()) from error
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)
        reason = (str(error).splitlines() or [""])[0]
        if not reason.startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a loader process has ended, most often for want of memory; take fewer --data.workers ({reason})"
        ) from error


def _as_it_is(rows: Any) -> Any:
    return rows


def _steps(parts: Iterator[tuple[Rows, ...]], workers: int, pin: bool) -> Iterator[tuple[Rows, ...]]:
    """The rows of whole steps: the loader gives its processes' parts in turn."""
    while shares := tuple(islice(parts, workers)):
        yield tuple(_joined(group, pin) for group in zip(*shares, strict=True))


def _joined(parts: Sequence[Rows], pin: bool) -> Rows:
    marks = [part.mark for part in parts]
    return Rows(
        _joined_pixels([part.pixels for part in parts], pin),
        tuple(chain.from_iterable(part.keys for part in parts)),
        Mark(
            torch.cat([mark.cursors for mark in marks]),
            sum(mark.shards for mark in marks),
            tuple(chain.from_iterable(mark.faults for mark in marks)),
        ),
    )


def _joined_pixels(parts: Sequence[Tensor], pin: bool) -> Tensor:
    """Parts [b, 3, side, side] as one [B, 3, side, side].

    Joined into page-locked memory: a copy of page-locked parts would lie in ordinary memory again, from where
    a copy to the GPU makes the step wait.
    """
    if not pin:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return torch.cat(list(parts), out=_page_locked((sum(map(len, parts)), *parts[0].shape[1:])))


def _page_locked(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

"""The stream of a rank's crops, step by step: loader processes share its lanes and prefetch."""

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
from .faults import ReadError, ReadStats
from .lanes import LaneAssignment, ShardStream, sharing
from .sources import Sources

# Letters: B images of this rank, L its lanes, S sources.

T = TypeVar("T")

_OTHER_FILES = 512  # other open files of a process: libraries and shared memory
_READ_AHEAD = 4  # steps per loader process
_TENSORS = 2  # per group's rows; each needs an open file between processes


class Mark(NamedTuple):
    """The lanes' cursors after some images, and statistics of reading these."""

    cursors: Tensor  # int64 [L, S, 4]
    shards: int  # started
    faults: tuple[ReadError, ...]  # what could not be read


class Rows(NamedTuple):
    """A rank's images of one group in one step."""

    pixels: Tensor  # uint8 [B, 3, side, side]
    keys: tuple[str, ...]  # the samples' names
    mark: Mark


class Share(NamedTuple):
    """A rank's part of one group's images."""

    assignment: LaneAssignment
    lanes: range
    side: int  # pixels of the square crops
    cursors: Tensor  # int64 [L, S, 4]


class LaneStream(IterableDataset[tuple[Rows, ...]]):
    """The crops of a rank for some steps, per group; a loader process yields those of its lanes only."""

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

    def _open(self, share: Share, worker: int, workers: int) -> dict[int, ShardStream]:
        count = len(share.lanes) // workers
        places = range(worker * count, (worker + 1) * count)
        return {
            share.lanes[n]: self.sources.lane(share.assignment, share.lanes[n], share.cursors[n], self.seed)
            for n in places
        }

    def _rows(self, share: Share, lanes: dict[int, ShardStream], step: int) -> Rows:
        tally = ReadStats()
        pixels, keys = [], []
        for number, lane in lanes.items():
            for place in range(share.assignment.each):
                sample = lane.take(tally)
                position = share.assignment.position(step, number, place)
                pixels.append(random_view(sample.image, self.config, share.side, self.seed, position))
                keys.append(sample.key)
        cursors = torch.stack([lane.cursor for lane in lanes.values()])
        return Rows(torch.stack(pixels), tuple(keys), Mark(cursors, tally.shards, tuple(tally.faults)))


def open_stream(
    sources: Sources, shares: Sequence[Share], config: DataConfig, seed: int, steps: range, *, pin: bool
) -> Iterator[tuple[Rows, ...]]:
    """Open the stream of a rank's rows: for each step one item, with rows for every group of the rank.

    The loader's processes start immediately, in the calling thread. There are fewer than configured if
    they could not share the lanes evenly.

    Args:
        sources: the data.
        shares: the rank's lanes in each of its groups.
        config: crops and workers.
        seed: decides the order and the crops.
        steps: the steps to yield.
        pin: put the images into pinned memory, for a GPU.
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
    """Raise this process's limit of open files by `count`, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def fewer_workers(wanted: int, shares: Sequence[Share]) -> str:
    """Explain why a rank has fewer loader processes than configured; empty if it has not."""
    lanes = [len(share.lanes) for share in shares]
    workers = sharing(wanted, lanes)
    if workers == wanted:
        return ""
    counts = " and ".join(map(str, lanes))
    return f"{workers} loader processes instead of {wanted}: they share the {counts} streams of a rank evenly"


def rows_of(loader: Iterable[T]) -> Iterator[T]:
    """Yield a loader's rows; re-raise an error of a worker process as the original, without its traceback.

    Raises:
        RadioError: a worker raised it, or was killed.
        OSError, MemoryError: a worker raised it.
    """
    try:
        yield from loader
    except (RadioError, OSError, MemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # frames keep each other, and so the processes, alive
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
    """Join the parts of whole steps: the loader yields its processes' parts alternately."""
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
    """Join parts [b, 3, side, side] to one tensor [B, 3, side, side].

    With `pin`, into pinned memory: concatenating pinned parts would give ordinary memory again, and a copy
    from there to the GPU blocks the step.
    """
    if not pin:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return torch.cat(list(parts), out=_page_locked((sum(map(len, parts)), *parts[0].shape[1:])))


def _page_locked(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

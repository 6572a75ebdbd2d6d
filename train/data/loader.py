"""The loader of a run: crops read by worker processes, the teachers' features, and a state to resume from.

Worker processes share the streams of a rank and read ahead, and the next batch may be prepared in a thread.
Each step's crops therefore come with the cursors after them; the loader's state is that of the batch it
yielded last, whatever was read ahead.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Annotated, Any, NamedTuple, TypeVar, cast, final

import torch
from annotated_types import Interval
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import TypedDict

from radio.dist import Ranks
from radio.errors import CheckpointError, DataError, RadioError
from radio.io import validate
from radio.ops import resize_images
from radio.types import Features

from ..config import DataConfig, TrainConfig
from ..groups import Partition, TeacherGroup
from ..shift import Frame, Frames, Framing, cut
from .crops import random_view
from .errors import ErrorMonitor, ReadStats
from .streams import ShardStream, Source, Sources, StreamAssignment, assign_streams

# Letters: B images of a group on this rank, L its streams, S sources.

T = TypeVar("T")

READ_AHEAD = 4  # steps per loader process
_OTHER_FILES = 512  # other open files of a process: libraries and shared memory
_TENSORS = 2  # per group's rows; each needs an open file between processes
_CPU = torch.device("cpu")
_END = object()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # that request a run to stop


class GroupBatch(NamedTuple):
    """One group's images on this rank with its teachers' features."""

    group: TeacherGroup
    images: Tensor  # [B, 3, side, side] in [0, 1], on the device, at the student's resolution
    targets: dict[str, Features]
    crops: Tensor | None = None  # random position crops of its images, see `Student.sample_crops`
    frames: Frames | None = None  # what the models see of shifted crops; None = all the same
    second: Tensor | None = None  # as images, in the averaged student's frame; None = the same

    def split(self, count: int) -> list[GroupBatch]:
        """Split into `count` equal parts, in order."""
        if count == 1:
            return [self]
        size = len(self.images) // count
        parts = []
        for first in range(0, count * size, size):
            rows = slice(first, first + size)
            targets = {
                name: Features(target.summary[rows], target.tokens[rows], target.grid)
                for name, target in self.targets.items()
            }
            crops, second = (None if each is None else each[rows] for each in (self.crops, self.second))
            parts.append(GroupBatch(self.group, self.images[rows], targets, crops, self.frames, second))
        return parts


class Batch(NamedTuple):
    """One step's images and targets on this rank."""

    groups: tuple[GroupBatch, ...]
    waited: float  # seconds for the images


Teach = Callable[[int, TeacherGroup, Tensor], dict[str, Features]]


class LoaderState(TypedDict):
    """The state of a loader, independent of ranks and workers."""

    cursors: list[list[list[list[Annotated[int, Interval(ge=0, lt=2**48)]]]]]  # for every group: [L, S, 4]
    counts: list[Annotated[int, Interval(ge=0, lt=2**48)]]  # of read errors


_STATE = TypeAdapter(LoaderState)


@final
class Loader:
    """The batches of a run on one rank. Every rank calls every method.

    Args:
        config: the run's settings.
        partition: the groups of teachers and their ranks.
        ranks: all ranks.
        data: the streams' sources; other data (for a teacher cache) are only hashed here.
        sides: pixels of every group's square crops, by the student's side.
        device: this rank's device.
        log: called with a message for the user.
        framing: what each model sees of the crops; None = all of them.

    Raises:
        ConfigError: ranks cannot share the streams of their group.
        DataError: the path of the list of broken data is not a file.
    """

    def __init__(
        self,
        config: TrainConfig,
        partition: Partition,
        ranks: Ranks,
        data: Source,
        sides: Sequence[Mapping[int, int]],
        device: torch.device,
        log: Callable[[str], None],
        framing: Framing | None = None,
    ) -> None:
        self.errors = ErrorMonitor(config.out, ranks, log)
        if ranks.leads:  # hashes folders of images; other ranks then read the stored hash
            _ = data.fingerprint
        ranks.barrier()
        for note in data.notes:
            log(note)
        self._config, self._partition, self._ranks = config, partition, ranks
        self._data, self._sides, self._device, self._log = data, sides, device, log
        self._framing = framing
        self._assignments = assign_streams(config, partition) if isinstance(data, Sources) else ()
        self._shares: list[Share] = []
        self._load([assignment.zeros(self._num_sources) for assignment in self._assignments])

    def batches(self, start: int, teach: Teach, *, ahead: bool) -> Iterator[Batch]:
        """Yield the batches of the steps from `start` on.

        Args:
            start: the first step.
            teach: computes the features of a group's images in a step by its teachers.
            ahead: prepare the next batch in a thread while the current one is used.
        """
        # Worker processes start here, in the calling thread: one forked from a pool's thread would fail.
        rows = self.rows(range(start, self._config.steps), pin=self._device.type == "cuda")
        groups = [share.group for share in self._shares]
        steps = with_targets(rows, groups, self._device, teach, self._config.seed, start, self._framing)
        for batch, read in prefetch(steps, self._device) if ahead else steps:
            self._shares = [
                share._replace(cursors=each.cursors) for share, each in zip(self._shares, read, strict=True)
            ]
            for each in read:
                self.errors.add(each.stats.shards, each.stats.errors)
            yield batch

    def rows(self, steps: range, *, pin: bool = False) -> Iterator[tuple[Rows, ...]]:
        """Start the worker processes; yield the crops of each step, for every group of this rank."""
        assert isinstance(self._data, Sources)
        config, counts = self._config.data, [len(share.streams) for share in self._shares]
        workers = share_evenly(config.workers, counts)
        if workers != config.workers:
            streams = " and ".join(map(str, counts))
            self._log(
                f"{workers} loader processes instead of {config.workers}: they share the {streams} streams "
                f"of a rank evenly"
            )
        return open_stream(self._data, self._shares, config, self._config.seed, steps, workers, pin=pin)

    def state_dict(self) -> LoaderState:
        """Return the state after the batch that was yielded last."""
        local = {share.assignment.group: share for share in self._shares}
        cursors = []
        for assignment in self._assignments:
            whole = assignment.zeros(self._num_sources)
            if assignment.group in local:
                streams = local[assignment.group].streams
                whole[streams.start : streams.stop] = local[assignment.group].cursors
            cursors.append(self._ranks.sum(whole).tolist())
        return {"cursors": cursors, "counts": self.errors.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: it has other groups, streams or sources, or is not such a state.
        """
        valid = validate(_STATE, state, "the state's place in the data", error=CheckpointError)
        expected = [list(each.zeros(self._num_sources).shape) for each in self._assignments]
        cursors = [_to_tensor(lists) for lists in valid["cursors"]]
        shapes = [list(each.shape) for each in cursors]
        if shapes != expected:
            raise CheckpointError(
                f"the state has cursors of {shapes} and this run of {expected} (streams, sources, numbers); "
                f"give the settings that it was saved with, or --restart to begin anew"
            )
        self.errors.load_state_dict(valid["counts"])
        self._load(cursors)

    @property
    def _num_sources(self) -> int:
        return len(self._data) if isinstance(self._data, Sources) else 0

    def _load(self, cursors: Sequence[Tensor]) -> None:
        """Take this rank's streams of every group's cursors [L, S, 4]."""
        self._shares = []
        for assignment, whole in zip(self._assignments, cursors, strict=True):
            if streams := assignment.local(self._partition, self._ranks.rank):
                group, sides = self._partition.groups[assignment.group], self._sides[assignment.group]
                own = whole[streams.start : streams.stop]
                self._shares.append(Share(assignment, streams, group, sides, own))


def _to_tensor(cursors: Any) -> Tensor:
    """Convert nested lists to int64 [L, S, 4]; to a scalar where they are uneven."""
    try:
        return torch.tensor(cursors, dtype=torch.int64)
    except ValueError:
        return torch.empty((), dtype=torch.int64)


def with_targets(
    rows: Iterable[tuple[Rows, ...]],
    groups: Sequence[TeacherGroup],
    device: torch.device,
    teach: Teach,
    seed: int,
    start: int,
    framing: Framing | None = None,
) -> Iterator[tuple[Batch, tuple[Rows, ...]]]:
    """Yield batches from step `start` on with the teachers' features of online crops, and these crops.

    `seed` is the run's; `framing` tells what the student sees of the crops, None: all of them.
    """
    for step, (read, waited) in enumerate(timed(rows), start):
        batches = []
        for group, row in zip(groups, read, strict=True):
            images = to_images(row.pixels, device)
            frames = None if framing is None else framing.at(group, step)
            own = for_student(images, group.side_at(seed, step) if frames is None else frames.student)
            second = for_student(images, frames.average) if framing and frames and framing.second else None
            targets = teach(step, group, images)
            batches.append(GroupBatch(group, own, targets, frames=frames, second=second))
        yield Batch(tuple(batches), waited), read


def to_images(pixels: Tensor, device: torch.device) -> Tensor:
    """Copy crops uint8 [B, 3, side, side] to the device, in [0, 1]."""
    return pixels.to(device, non_blocking=True).float().div_(255)


def for_student(images: Tensor, part: int | Frame) -> Tensor:
    """Resize crops to the student's side, or resize them and cut its frame out."""
    return cut(images, part) if isinstance(part, Frame) else resize_images(images, (part, part))


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Yield each item with the seconds spent waiting for it."""
    iterator = iter(items)
    while True:
        start = time.perf_counter()
        item = next(iterator, _END)
        waited = time.perf_counter() - start
        if item is _END:
            return
        yield cast(T, item), waited


class Share(NamedTuple):
    """A rank's part of one group's images."""

    assignment: StreamAssignment
    streams: range
    group: TeacherGroup
    crop_sides: Mapping[int, int]  # pixels of the square crops, by the student's side
    cursors: Tensor  # int64 [L, S, 4]


class Rows(NamedTuple):
    """A rank's images of one group in one step."""

    pixels: Tensor  # uint8 [B, 3, side, side]
    keys: tuple[str, ...]  # the samples' names
    cursors: Tensor  # int64 [L, S, 4] after these images
    stats: ReadStats  # of reading them


@dataclass(eq=False)
class CropStreams(IterableDataset[tuple[Rows, ...]]):
    """The crops of a rank for some steps, per group; a loader process yields those of its streams only."""

    sources: Sources
    shares: Sequence[Share]
    config: DataConfig
    seed: int
    steps: range

    def __iter__(self) -> Iterator[tuple[Rows, ...]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        groups = [self._open(share, worker, workers) for share in self.shares]
        make_room_for_files(len(self.sources) * sum(map(len, groups)))
        try:
            for step in self.steps:
                yield tuple(
                    self._read(share, streams, step)
                    for share, streams in zip(self.shares, groups, strict=True)
                )
        finally:
            for stream in chain.from_iterable(streams.values() for streams in groups):
                stream.close()

    def _open(self, share: Share, worker: int, workers: int) -> dict[int, ShardStream]:
        count = len(share.streams) // workers
        return {
            share.streams[n]: self.sources.open(
                share.assignment, share.streams[n], share.cursors[n], self.seed
            )
            for n in range(worker * count, (worker + 1) * count)
        }

    def _read(self, share: Share, streams: dict[int, ShardStream], step: int) -> Rows:
        stats, pixels, keys = ReadStats(), [], []
        side = share.crop_sides[share.group.side_at(self.seed, step)]
        for number, stream in streams.items():
            for index in range(share.assignment.images_per_stream):
                position = share.assignment.position(step, number, index)
                view = partial(random_view, config=self.config, side=side, seed=self.seed, number=position)
                sample = stream.take(view, stats)
                pixels.append(sample.pixels)
                keys.append(sample.key)
        cursors = torch.stack([stream.cursor for stream in streams.values()])
        return Rows(torch.stack(pixels), tuple(keys), cursors, stats)


def outlast_signals(worker: int) -> None:
    """Keep a loader's process alive when its run is requested to stop.

    torchrun and schedulers signal all processes of a group, but the run still needs its images. Only signals
    of the parent process end a loader: it terminates its loaders with SIGTERM and waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def share_evenly(workers: int, counts: Sequence[int]) -> int:
    """Return the largest number of loader processes, up to `workers`, that share a rank's streams evenly."""
    return next((n for n in range(workers, 0, -1) if all(count % n == 0 for count in counts)), 0)


def open_stream(
    sources: Sources,
    shares: Sequence[Share],
    config: DataConfig,
    seed: int,
    steps: range,
    workers: int,
    *,
    pin: bool,
) -> Iterator[tuple[Rows, ...]]:
    """Start a rank's loader processes; yield for each step the rows of every group of the rank.

    Args:
        sources: the data.
        shares: the rank's streams in each of its groups.
        config: how to crop.
        seed: decides the order and the crops.
        steps: the steps to yield.
        workers: number of processes, which share the streams of each group evenly.
        pin: put the images into pinned memory, for a GPU.
    """
    make_room_for_files(workers * READ_AHEAD * _TENSORS * len(shares))
    loader = DataLoader(
        CropStreams(sources, shares, config, seed, steps),
        batch_size=None,
        num_workers=workers,
        collate_fn=_keep,
        worker_init_fn=outlast_signals,
        prefetch_factor=READ_AHEAD if workers else None,
    )
    return _join_steps(rows_of(iter(loader)), max(workers, 1), pin)


def _keep(rows: Any) -> Any:
    return rows


def _join_steps(parts: Iterator[tuple[Rows, ...]], workers: int, pin: bool) -> Iterator[tuple[Rows, ...]]:
    """Join the parts of whole steps: the loader yields its processes' parts alternately."""
    while step := tuple(islice(parts, workers)):
        yield tuple(_join(group, pin) for group in zip(*step, strict=True))


def _join(parts: Sequence[Rows], pin: bool) -> Rows:
    pixels = [part.pixels for part in parts]
    if pin:
        # Concatenating pinned parts would give ordinary memory, and copies from it to a GPU block the step.
        joined = torch.cat(pixels, out=_page_locked((sum(map(len, pixels)), *pixels[0].shape[1:])))
    else:
        joined = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
    stats = ReadStats(
        sum(part.stats.shards for part in parts), [error for part in parts for error in part.stats.errors]
    )
    keys = tuple(chain.from_iterable(part.keys for part in parts))
    return Rows(joined, keys, torch.cat([part.cursors for part in parts]), stats)


def _page_locked(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


def make_room_for_files(count: int) -> None:
    """Raise this process's limit of open files by `count`, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


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


def prefetch(items: Iterator[T], device: torch.device = _CPU) -> Iterator[T]:
    """Prefetch the next item of an iterator in a separate thread while the current one is used.

    An error in producing an item is raised where the item would be yielded. On a GPU the thread uses a
    separate CUDA stream, so that its kernels overlap with the caller's.

    Args:
        items: the iterator to prefetch; tensors may be nested in tuples, lists and dicts.
        device: where the items are produced and used.
    """
    stream = _Stream(device) if device.type == "cuda" else None

    def make() -> tuple[object, torch.cuda.Event | None]:
        return (next(items, _END), None) if stream is None else stream.make(items)

    begin = None if stream is None else stream.enter
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=begin) as pool:
        pending = pool.submit(make)
        while True:
            item, ready = pending.result()
            if item is _END:
                return
            pending = pool.submit(make)
            if stream is not None and ready is not None:
                stream.hand_over(item, ready)
            yield cast(T, item)


@final
class _Stream:
    """A CUDA stream for the prefetching thread, ordered with the caller's stream by events only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be being copied

    def enter(self) -> None:
        """Select the rank's device in the thread: a new thread always starts on GPU 0."""
        torch.cuda.set_device(self.device)

    def make(self, items: Iterator[Any]) -> tuple[object, torch.cuda.Event]:
        """Produce the next item and the event that marks it as ready."""
        with torch.cuda.stream(self.stream):
            item = next(items, _END)
            return item, self.stream.record_event()

    def hand_over(self, item: object, ready: torch.cuda.Event) -> None:
        """Make the caller's stream wait for the item on the device and keep its memory until it is used."""
        user = torch.cuda.current_stream(self.device)
        user.wait_event(ready)
        for leaf in tree_leaves(item):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(user)


@contextmanager
def limit_threads() -> Iterator[None]:
    """Halve the threads of each torch operator, so that two operators can run in parallel.

    Small networks gain from a second operator in parallel, not from a second thread inside one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Teacher cache: features of fixed crops, computed once and read during training.

A cache belongs to a group of teachers. It holds, for every crop, its pixels and each teacher's summary and
tokens in half precision, in files with a fixed number of crops and a checksum each; its folder's name is a
hash of everything they depend on. The ranks of the group split the files among them. Missing files are
written, whichever run wrote the others; damaged files are deleted before a run starts and written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, final

import safetensors
import torch
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from radio.chunks import Damage, DamagedError, TensorSpec, chunk_path, read_tensors, write_tensors
from radio.config import to_plain
from radio.dist import Ranks
from radio.errors import RadioError
from radio.io import read_json, write_text
from radio.types import Features, Teacher

from .config import TrainConfig
from .data.crops import FixedCrops, seed_of, shuffled_index
from .data.errors import check_fraction
from .data.loader import (
    READ_AHEAD,
    Batch,
    GroupBatch,
    for_student,
    make_room_for_files,
    outlast_signals,
    rows_of,
    timed,
    to_images,
)
from .data.streams import ConcatImages
from .groups import Partition, TeacherGroup, TeacherSizes
from .loggers import ProgressConsole, say
from .setup import teacher_features

# Letters: N crops, C summary width, T tokens, D token width.

_FILE = 128  # crops
_BATCH = 32  # crops per forward of the teachers
_OPEN = 256  # open files per process
_POLL = 1.0  # seconds between two checks of what other ranks have written
_PATIENCE = 3600.0  # seconds without a new file
_LARGE = 1e9  # bytes; above this the user has to confirm
_METADATA = TypeAdapter(dict[str, Any])  # for people; only compared with the settings


class Computed(NamedTuple):
    """The cached tensors [N, ...] of some crops by name, and each teacher's grid."""

    tensors: dict[str, Tensor]
    grids: dict[str, tuple[int, int]]


@final
class CacheJob:
    """One cache to write: teachers, crops and device.

    Args:
        root: folder of all caches.
        teachers: the group's frozen teachers on `device`, by adaptor name.
        sizes: each teacher's input (height, width) in pixels.
        crops: the teachers' inputs.
        device: where the teachers run.
    """

    def __init__(
        self,
        root: Path,
        teachers: Mapping[str, Teacher],
        sizes: Mapping[str, tuple[int, int]],
        crops: FixedCrops,
        device: torch.device,
    ) -> None:
        self.root, self.crops, self.device = root, crops, device
        self.teachers, self.sizes = teachers, {name: sizes[name] for name in teachers}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the features depend on."""
        crops, config = self.crops, self.crops.config
        return {
            "teachers": {
                name: (t.fingerprint, self.sizes[name]) for name, t in sorted(self.teachers.items())
            },
            "data": crops.images.fingerprint,
            "crop": (to_plain(config.crop_scale), to_plain(config.crop_aspect), config.flip, crops.side),
            "count": (crops.count, crops.crops),
            "seed": crops.seed,
        }

    @cached_property
    def folder(self) -> Path:
        """Folder of the cache, named by a hash of its settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return self.root / hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def files(self) -> list[Path]:
        """All files of the whole cache."""
        return [chunk_path(self.folder, index) for index in range(-(-len(self.crops) // _FILE))]

    @property
    def is_begun(self) -> bool:
        """Whether it was started, and its size confirmed, before."""
        try:
            metadata = read_json(self.folder / "metadata.json", _METADATA, error=DamagedError)
        except DamagedError:
            return False
        return bool(metadata == json.loads(json.dumps(self.settings)))

    @property
    def size(self) -> int:
        """Size of the whole cache in bytes."""
        return len(self.crops) * sum(tensor.nbytes for tensor in self._probe.tensors.values())

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Each teacher's grid (height, width) in tokens."""
        return self._probe.grids

    @cached_property
    def _probe(self) -> Computed:
        """Shapes and dtypes for one crop, from a forward of a black image."""
        side = self.crops.side
        return self.compute(torch.zeros(1, 3, side, side, dtype=torch.uint8))

    def compute(self, pixels: Tensor) -> Computed:
        """Compute the cache's tensors for crops uint8 [N, 3, side, side].

        Raises:
            RadioError: features exceed half precision.
        """
        tensors, grids = {"pixels": pixels}, {}
        images = to_images(pixels, self.device)
        for name, features in teacher_features(self.teachers, self.sizes, images).items():
            for kind, values in (("summary", features.summary), ("tokens", features.tokens)):
                half = values.half()
                if not bool(torch.isfinite(half).all()):
                    raise RadioError(
                        f"teacher {name} gives features beyond half precision (65504); train with it online"
                    )
                tensors[f"{name}.{kind}"] = half.cpu()
            grids[name] = features.grid
        return Computed(tensors, grids)

    def check(self, index: int) -> None:
        """Read and verify one of its files.

        Raises:
            DamagedError: its content differs from what was written.
        """
        count = min(_FILE, len(self.crops) - index * _FILE)
        specs = {
            name: TensorSpec(tensor.dtype, (count, *tensor.shape[1:]))
            for name, tensor in self._probe.tensors.items()
        }
        path = self.files[index]
        tensors = read_tensors(path, specs).tensors
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
            raise DamagedError(f"{path}: it holds NaN or infinity")

    def discard_damaged(self, index: int, damage: Damage) -> None:
        """Check one of its files, and remove it if it is damaged: other ranks take what exists for whole."""
        path = self.files[index]
        if not path.exists() and not path.is_symlink():
            return
        try:
            self.check(index)
        except DamagedError as error:
            damage.add(error)
            _opened.cache_clear()
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class Cached(NamedTuple):
    """One crop with every teacher's features."""

    pixels: Tensor  # uint8 [3, side, side]
    summaries: dict[str, Tensor]  # [C] float16 each
    tokens: dict[str, Tensor]  # [T, D] float16 each


@final
class FeatureCache(Dataset[Cached]):
    """A complete cache as an endless shuffled stream, indexed by position; `seed` decides the order."""

    def __init__(self, folder: Path, count: int, seed: int, grids: Mapping[str, tuple[int, int]]) -> None:
        self.folder, self.count, self.seed, self.grids = folder, count, seed, dict(grids)

    def __getitem__(self, position: int) -> Cached:
        """Read the crop at a position of the stream."""
        index, row = divmod(shuffled_index(position, self.count, self.seed), _FILE)
        path = chunk_path(self.folder, index)
        try:
            file = _opened(path)
            return Cached(
                file.get_slice("pixels")[row],
                {name: file.get_slice(f"{name}.summary")[row] for name in self.grids},
                {name: file.get_slice(f"{name}.tokens")[row] for name in self.grids},
            )
        except (safetensors.SafetensorError, OSError) as error:
            raise DamagedError(
                f"{path}: was whole when the run began and is damaged now ({error}); start the run again, "
                f"and it is written again"
            ) from error


@lru_cache(maxsize=_OPEN)
def _opened(path: Path) -> Any:
    return safetensors.safe_open(path, framework="pt")


@final
class GroupedCaches(Dataset[list[Cached]]):
    """The caches of a rank's groups, by step: the collated crops of each group."""

    def __init__(self, caches: Mapping[str, FeatureCache], partition: Partition, rank: int) -> None:
        self._caches, self._partition, self._rank = caches, partition, rank

    def __getitem__(self, step: int) -> list[Cached]:
        """Read this rank's crops of a step."""
        rows = []
        for group in self._partition.of(self._rank):
            first = self._partition.rows(group, self._rank).start - group.first + step * group.batch_size
            cache = self._caches[group.name]
            rows.append(default_collate([cache[position] for position in range(first, first + group.share)]))
        return rows

    def rows(self, config: TrainConfig, start: int, device: torch.device) -> Iterator[list[Cached]]:
        """Yield the crops of the steps from `start` on, read by worker processes."""
        workers = config.data.workers
        tensors = sum(1 + 2 * len(cache.grids) for cache in self._caches.values())  # each needs an open file
        make_room_for_files(workers * READ_AHEAD * tensors)
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, config.steps),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=outlast_signals,
            prefetch_factor=READ_AHEAD if workers else None,
        )
        return rows_of(iter(loader))

    def batches(self, config: TrainConfig, start: int, device: torch.device) -> Iterator[Batch]:
        """Yield the batches of the steps from `start` on, with the teachers' features in float32."""
        for step, (read, waited) in enumerate(timed(self.rows(config, start, device)), start):
            batches = []
            for group, row in zip(self._partition.of(self._rank), read, strict=True):
                images = for_student(to_images(row.pixels, device), group.side_at(config.seed, step))
                batches.append(GroupBatch(group, images, self.targets(row, group, device)))
            yield Batch(tuple(batches), waited)

    def targets(self, row: Cached, group: TeacherGroup, device: torch.device) -> dict[str, Features]:
        """Return the features of a group's collated crops by teacher, in float32 on the device."""
        return {
            name: Features(
                row.summaries[name].to(device, non_blocking=True).float(),
                row.tokens[name].to(device, non_blocking=True).float(),
                grid,
            )
            for name, grid in self._caches[group.name].grids.items()
        }


def fill_caches(
    config: TrainConfig,
    partition: Partition,
    ranks: Ranks,
    data: ConcatImages,
    teachers: Mapping[str, Teacher],
    sizes: TeacherSizes,
    device: torch.device,
    console: Console,
) -> GroupedCaches:
    """Open the caches of this rank's groups of teachers with a progress bar; write what is missing first.

    Raises:
        RadioError: more than 1 GB would be written without confirmation; or as `open_caches`.
    """
    options = config.cache
    assert options.folder is not None, "called only where there is a cache"
    count = min(options.images or len(data), len(data))
    jobs = {}
    for group, sides in zip(partition.groups, partition.crop_sides(sizes), strict=True):
        if ranks.rank in group.ranks:
            crops = FixedCrops(data, config.data, max(sides.values()), config.seed, count, options.crops)
            own = {name: teachers[name] for name in group.teachers}
            fixed = {name: sizes[name][group.sides[0]] for name in own}  # the same at every side
            jobs[group.name] = CacheJob(options.folder, own, fixed, crops, device)

    def confirm(size: int) -> None:
        say(console, f"teacher cache: {size / 1e9:.2f} GB in {options.folder}")
        if size <= _LARGE or not options.confirm:
            return
        if not console.is_terminal:
            raise RadioError(f"a teacher cache of {size / 1e9:.1f} GB would be written; agree with --yes")
        if console.input("write it? [y/N] ").strip().lower() not in ("y", "yes"):
            raise RadioError(
                "the teacher cache was not written; leave --cache.folder out to run the teachers online"
            )

    with ProgressConsole(console, "teacher cache", sum(len(job.crops) for job in jobs.values()), 0) as bar:
        return open_caches(
            jobs,
            partition,
            ranks,
            workers=config.data.workers,
            confirm=confirm,
            progress=bar.advance,
            log=lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False),
        )


def open_caches(
    jobs: Mapping[str, CacheJob],
    partition: Partition,
    ranks: Ranks,
    *,
    workers: int,
    confirm: Callable[[int], None],
    progress: Callable[[int], None],
    log: Callable[[str], None],
) -> GroupedCaches:
    """Open the caches of this rank's groups; write what is missing first.

    Every rank calls it. Each checks and writes its part of the files, and waits for the other ranks by
    polling for theirs: no collective is pending while teachers run, so none can time out.

    Args:
        jobs: the caches of this rank's groups, by the group's name.
        partition: which ranks share a group's files.
        ranks: all ranks.
        workers: loader processes.
        confirm: called on the first rank with the size in bytes of all caches that are not started yet;
            raises to refuse.
        progress: called with the number of finished crops of this rank's groups.
        log: called with a line about damaged files.

    Raises:
        RadioError: `confirm` refused, the disk has no space, too many images are broken, or other ranks
            have stopped writing.
    """
    groups = [group for group in partition.groups if group.name in jobs]
    parts = {group.name: (group.ranks.index(ranks.rank), len(group.ranks)) for group in groups}
    agree([jobs[group.name] for group in groups if group.ranks[0] == ranks.rank], ranks, confirm)
    damage = Damage()
    for name, (part, num_parts) in parts.items():
        for index in range(part, len(jobs[name].files), num_parts):
            jobs[name].discard_damaged(index, damage)
    for note in damage.notes(ranks):  # from here on, existing files are intact
        log(note)
    written = _Written(list(jobs.values()), progress)
    for name, (part, num_parts) in parts.items():
        write_files(jobs[name], part, num_parts, workers, written)
    written.wait()
    caches = {}
    for index, group in enumerate(partition.groups):
        if group.name in jobs:
            job = jobs[group.name]
            order = seed_of(job.crops.seed, "group", index)
            caches[group.name] = FeatureCache(job.folder, len(job.crops), order, job.grids)
    return GroupedCaches(caches, partition, ranks.rank)


def agree(jobs: Sequence[CacheJob], ranks: Ranks, confirm: Callable[[int], None]) -> None:
    """Start the caches that are not started yet, once the first rank confirms their total size.

    Args:
        jobs: the caches that this rank is responsible for.
        ranks: all ranks, which all call this.
        confirm: called on the first rank with bytes; raises to refuse.

    Raises:
        RadioError: on every rank, if `confirm` refused or the disk has no space.
    """
    new = [job for job in jobs if not job.is_begun]
    sizes = [each for part in ranks.gather_objects([(job.root, job.size) for job in new]) for each in part]

    def check() -> None:
        if sizes:
            total = sum(size for _, size in sizes)
            confirm(total)
            _check_room(sizes[0][0], total)

    ranks.on_leader(check)
    for job in new:
        write_text(job.folder / "metadata.json", json.dumps(job.settings, indent=1))


def _check_room(root: Path, size: int) -> None:
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise RadioError(
            f"{root}: a teacher cache of {size / 1e9:.1f} GB does not fit, {free / 1e9:.1f} GB are free; "
            f"take fewer images or crops, or another --cache.folder"
        )


def write_files(job: CacheJob, part: int, num_parts: int, workers: int, update: Callable[[], None]) -> None:
    """Write every missing `num_parts`-th file of a cache from `part` on; call `update` after each.

    Raises:
        RadioError: features exceed half precision, or too many images are broken.
    """
    files = job.files
    missing = [index for index in range(part, len(files), num_parts) if not files[index].is_file()]
    batches = [batch for index in missing for batch in _batches(index, len(job.crops))]
    rows = rows_of(iter(DataLoader(job.crops, batch_sampler=batches, num_workers=workers)))
    broken = seen = 0
    for index in missing:
        computed: list[dict[str, Tensor]] = []
        for _ in _batches(index, len(job.crops)):
            batch = next(rows)
            computed.append(job.compute(batch.pixels).tensors)
            broken, seen = broken + int(batch.broken.sum()), seen + len(batch.pixels)
        check_fraction(broken, seen, job.crops.config.max_error_fraction)
        write_tensors(files[index], {name: torch.cat([c[name] for c in computed]) for name in computed[0]})
        update()


def _batches(index: int, count: int) -> Iterator[list[int]]:
    """Yield the crop indices of one file in batches for the teachers."""
    stop = min((index + 1) * _FILE, count)
    for first in range(index * _FILE, stop, _BATCH):
        yield list(range(first, min(first + _BATCH, stop)))


class _Written:
    """Tracks which files all ranks have written."""

    def __init__(self, jobs: Sequence[CacheJob], progress: Callable[[int], None]) -> None:
        self._total = sum(len(job.crops) for job in jobs)
        self._waiting = [path for job in jobs for path in job.files]
        self._num_files = len(self._waiting)
        self._progress = progress
        self._last_look = -_POLL

    def __call__(self) -> None:
        """Report the progress, at most once a second, since there may be many files."""
        if time.monotonic() - self._last_look >= _POLL:
            self._look()

    def _look(self) -> None:
        self._last_look = time.monotonic()
        self._waiting = [path for path in self._waiting if not path.is_file()]
        done = self._num_files - len(self._waiting)
        self._progress(min(done * _FILE, self._total) if self._waiting else self._total)

    def wait(self) -> None:
        """Wait until every file is written.

        Raises:
            RadioError: no new file for an hour.
        """
        self._look()
        left, since = len(self._waiting), time.monotonic()
        while self._waiting:
            time.sleep(_POLL)
            self._look()
            if len(self._waiting) < left:
                left, since = len(self._waiting), time.monotonic()
            elif time.monotonic() - since > _PATIENCE:
                raise RadioError(
                    f"{self._waiting[0]}: other ranks were to write this and have written nothing for "
                    f"{_PATIENCE / 60:.0f} minutes; give --cache.folder a folder that all share"
                )

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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from radio.chunks import (
    Damage,
    DamagedError,
    TensorSpec,
    chunk_path,
    read_tensors,
    write_tensors,
)
from radio.config import to_plain
from radio.dist import Group
from radio.errors import RadioError
from radio.io import read_json, write_text
from radio.types import Features, Teacher

from .crops import FixedCrops
from .data.faults import check_share
from .data.stream import rows_of
from .partition import Partition
from .sampling import image_at, seed_of
from .step import teacher_features

# Letters: N crops, C summary width, T tokens, D token width.

_FILE = 128  # crops
_BATCH = 32  # crops per forward of the teachers
_OPEN = 256  # open files per process
_POLL = 1.0  # seconds between two checks of what other ranks have written
_PATIENCE = 3600.0  # seconds without a new file
_METADATA = TypeAdapter(dict[str, Any])  # for people; only compared with the settings


class Cached(NamedTuple):
    """One crop with every teacher's features."""

    pixels: Tensor  # uint8 [3, side, side]
    summaries: dict[str, Tensor]  # [C] float16 each
    tokens: dict[str, Tensor]  # [T, D] float16 each


@final
class CacheJob:
    """The inputs of one cache: teachers, crops and device.

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
        return [chunk_path(self.folder, number) for number in range(-(-len(self.crops) // _FILE))]

    @property
    def begun(self) -> bool:
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

    def check(self, number: int) -> None:
        """Read and verify one of its files.

        Raises:
            DamagedError: its content differs from what was written.
        """
        count = min(_FILE, len(self.crops) - number * _FILE)
        specs = {
            name: TensorSpec(tensor.dtype, (count, *tensor.shape[1:]))
            for name, tensor in self._probe.tensors.items()
        }
        path = self.files[number]
        tensors = read_tensors(path, specs).tensors
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
            raise DamagedError(f"{path}: it holds NaN or infinity")

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
        images = pixels.to(self.device).float().div_(255)
        tensors, grids = {"pixels": pixels}, {}
        for name, features in teacher_features(self.teachers, self.sizes, images).items():
            tensors[f"{name}.summary"] = _half(features.summary, name)
            tensors[f"{name}.tokens"] = _half(features.tokens, name)
            grids[name] = features.grid
        return Computed(tensors, grids)


class Computed(NamedTuple):
    """The cached tensors [N, ...] of some crops by name, and each teacher's grid."""

    tensors: dict[str, Tensor]
    grids: dict[str, tuple[int, int]]


@final
class FeatureCache(Dataset[Cached]):
    """A complete cache as an endless shuffled stream, indexed by position; `seed` decides the order."""

    def __init__(self, folder: Path, count: int, seed: int, grids: Mapping[str, tuple[int, int]]) -> None:
        self.folder, self.count, self.seed, self.grids = folder, count, seed, dict(grids)

    def __getitem__(self, position: int) -> Cached:
        """Read the crop at a position of the stream."""
        number, row = divmod(image_at(position, self.count, self.seed), _FILE)
        path = chunk_path(self.folder, number)
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


@final
class GroupedCaches(Dataset[Cached]):
    """The caches of a rank's groups, by position in the run: a step holds its groups' images in order."""

    def __init__(self, caches: Mapping[str, FeatureCache], partition: Partition) -> None:
        self._caches, self._partition = caches, partition

    def __getitem__(self, position: int) -> Cached:
        """Read the crop at a position of the run; this rank must have the cache of its group."""
        step, row = divmod(position, self._partition.batch_size)
        group = next(g for g in reversed(self._partition.groups) if g.first <= row)
        return self._caches[group.name][step * group.batch_size + row - group.first]

    def targets(
        self, summaries: Mapping[str, Tensor], tokens: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Features]:
        """Convert a collated batch of rows to features by teacher name, in float32 on the device."""
        grids = {name: grid for cache in self._caches.values() for name, grid in cache.grids.items()}
        return {
            name: Features(
                summaries[name].to(device, non_blocking=True).float(),
                tokens[name].to(device, non_blocking=True).float(),
                grids[name],
            )
            for name in summaries
        }


def open_caches(
    jobs: Mapping[str, CacheJob],
    partition: Partition,
    group: Group,
    *,
    workers: int,
    confirm: Callable[[int], None],
    progress: Callable[[int], None],
    tell: Callable[[str], None],
) -> GroupedCaches:
    """Open the caches of this rank's groups; write what is missing first.

    Every rank calls it. Each checks and writes its part of the files, and waits for the other ranks by
    polling for theirs: no collective is pending while teachers run, so none can time out.

    Args:
        jobs: the caches of this rank's groups, by the group's name.
        partition: which ranks share a group's files.
        group: the ranks.
        workers: loader processes.
        confirm: called on the first rank with the size in bytes of all caches that are not started yet;
            raises to refuse.
        progress: called with the number of finished crops of this rank's groups.
        tell: called with a line about damaged files.

    Raises:
        RadioError: `confirm` refused, the disk has no space, too many images are broken, or other ranks
            have stopped writing.
    """
    mine = [each for each in partition.groups if each.name in jobs]
    first = [jobs[each.name] for each in mine if each.ranks[0] == group.rank]
    agree(first, group, confirm)
    damage = Damage()
    for each in mine:
        discard_damaged(jobs[each.name], each.ranks.index(group.rank), len(each.ranks), damage)
    for note in damage.notes(group):  # from here on, existing files are intact
        tell(note)
    seen = _Written(list(jobs.values()), progress)
    for each in mine:
        job = jobs[each.name]
        write_files(job, each.ranks.index(group.rank), len(each.ranks), workers, seen)
    seen.wait()
    caches = {}
    for place, each in enumerate(partition.groups):
        if each.name in jobs:
            job = jobs[each.name]
            order = seed_of(job.crops.seed, "group", place)
            caches[each.name] = FeatureCache(job.folder, len(job.crops), order, job.grids)
    return GroupedCaches(caches, partition)


def agree(jobs: Sequence[CacheJob], group: Group, confirm: Callable[[int], None]) -> None:
    """Start the caches that are not started yet, once the first rank confirms their total size.

    Args:
        jobs: the caches that this rank is responsible for.
        group: the ranks, which all call this.
        confirm: called on the first rank with bytes; raises to refuse.

    Raises:
        RadioError: on every rank, if `confirm` refused or the disk has no space.
    """
    new = [job for job in jobs if not job.begun]
    parts = group.gather_objects([(str(job.root), job.size) for job in new])
    sizes = [entry for part in parts for entry in part]
    refusal: str | None = None
    if group.leads and sizes:
        try:
            total = sum(size for _, size in sizes)
            confirm(total)
            _check_room(Path(sizes[0][0]), total)
        except RadioError as error:
            refusal = str(error)
    (refusal, *_) = group.gather_objects(refusal)
    if refusal is not None:
        raise RadioError(refusal)
    for job in new:
        write_text(job.folder / "metadata.json", json.dumps(job.settings, indent=1))


def discard_damaged(job: CacheJob, place: int, of: int, damage: Damage) -> None:
    """Check every `of`-th file of a cache from `place` on and remove damaged ones."""
    for number in range(place, len(job.files), of):
        path = job.files[number]
        if not path.exists() and not path.is_symlink():
            continue
        try:
            job.check(number)
        except DamagedError as error:
            damage.add(error)
            _opened.cache_clear()
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def write_files(job: CacheJob, place: int, of: int, workers: int, tell: Callable[[], None]) -> None:
    """Write every missing `of`-th file of a cache from `place` on.

    Raises:
        RadioError: features exceed half precision, or too many images are broken.
    """
    missing = [number for number in range(place, len(job.files), of) if not job.files[number].is_file()]
    chunks = [chunk for number in missing for chunk in _chunks(number, len(job.crops))]
    loader = DataLoader(job.crops, batch_sampler=chunks, num_workers=workers)
    rows = rows_of(iter(loader))
    broken = seen = 0
    for number in missing:
        parts: list[Computed] = []
        for _ in _chunks(number, len(job.crops)):
            batch = next(rows)
            parts.append(job.compute(batch.pixels))
            broken, seen = broken + int(batch.broken.sum()), seen + len(batch.pixels)
        check_share(broken, seen, job.crops.config.max_error_fraction)
        _write(job.files[number], parts)
        tell()


class _Written:
    """Tracks which files all ranks have written."""

    def __init__(self, jobs: Sequence[CacheJob], progress: Callable[[int], None]) -> None:
        self._total = sum(len(job.crops) for job in jobs)
        self._waiting = [path for job in jobs for path in job.files]
        self._files = len(self._waiting)
        self._progress = progress
        self._looked = -_POLL

    def __call__(self) -> None:
        """Report the progress, at most once a second, since there may be many files."""
        if time.monotonic() - self._looked >= _POLL:
            self._look()

    def _look(self) -> None:
        self._looked = time.monotonic()
        self._waiting = [path for path in self._waiting if not path.is_file()]
        done = self._files - len(self._waiting)
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


def _chunks(number: int, count: int) -> Iterator[list[int]]:
    """Yield the crop indices of one file in batches for the teachers."""
    stop = min((number + 1) * _FILE, count)
    for first in range(number * _FILE, stop, _BATCH):
        yield list(range(first, min(first + _BATCH, stop)))


def _write(path: Path, parts: Sequence[Computed]) -> None:
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    write_tensors(path, tensors)


def _half(features: Tensor, name: str) -> Tensor:
    half = features.half()
    if not bool(torch.isfinite(half).all()):
        raise RadioError(f"teacher {name} gives features beyond half precision (65504); train with it online")
    return half.cpu()


def _check_room(root: Path, size: int) -> None:
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise RadioError(
            f"{root}: a teacher cache of {size / 1e9:.1f} GB does not fit, {free / 1e9:.1f} GB are free; "
            f"take fewer images or crops, or another --cache.folder"
        )


@lru_cache(maxsize=_OPEN)
def _opened(path: Path) -> Any:
    return safetensors.safe_open(path, framework="pt")

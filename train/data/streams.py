"""Streams: independent cursors through the data of a run, which suffice to resume it exactly.

A step's images are split over a fixed number of streams per group of teachers (`--data.num-streams`), a
contiguous block per stream. Each goes over all sources: shards are read in order, other images by
number. A rank takes contiguous images and hence contiguous streams, and its loader processes share those. So
which images come, and in which order, depends on the streams only, not on ranks or workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio.chunks import default_cache
from radio.data import SceneImages
from radio.errors import ConfigError, DataError
from radio.image_files import StoredImages, list_unlabelled

from ..config import ClusterConfig, DataConfig, TrainConfig
from ..groups import Partition
from .clusters import chance, hash_of, make_clusters
from .crops import View, seed_of, shuffled_index
from .errors import ReadError, ReadStats
from .shards import Shards, ShardSample, expand

# Letters: L streams, S sources.

CURSOR = 4  # numbers per source in a stream's cursor: unit, offset, seen, taken
_MAX_UNREADABLE = 20  # images in a row, where they are read by number
_ALIKE = ClusterConfig()


class SourceReader(Protocol):
    """One stream's reader of one source."""

    @property
    def place(self) -> tuple[int, int, int]:
        """The reader's position, from which it can resume."""

    def take(self, view: View, stats: ReadStats) -> ShardSample:
        """Read a view of the next readable image and record errors; raise DataError when none is left."""

    def close(self) -> None:
        """Close open files."""


class Source(Protocol):
    """A part of the data, or all of it."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of its content, or of the names of its shards."""

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Its entries in a checkpoint's metadata: path, fingerprint, count."""

    @property
    def count(self) -> int | None:
        """Number of images; None if it is not known before they are read."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user, about how its images are taken."""


class ReadableSource(Source, Protocol):
    """A part of the data that streams can read."""

    def open(self, stream: int, num_streams: int, place: Sequence[int], seed: int) -> SourceReader:
        """Open a stream's reader of the source at a position."""


class Part(NamedTuple):
    """Images of one folder, pattern of local shards, or generated world."""

    images: StoredImages | SceneImages
    num_images: int


@final
class ConcatImages:
    """Several parts concatenated and read by number; labels are never read.

    Args:
        parts: folders of images, local shards, scenes.
        config: how to balance clusters of images.

    Raises:
        ConfigError: a setting of `config` is without effect.
        DataError: a part has no file of clusters, or one that is damaged or lacks an image.
    """

    def __init__(self, parts: Sequence[Part], config: ClusterConfig = _ALIKE) -> None:
        self._parts = parts
        self._clusters = make_clusters(config, [_cluster_name(images) for images, _ in parts])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the parts' content, in order, and of the images' clusters if any."""
        text = " ".join(f"{images.fingerprint} {count}" for images, count in self._parts)
        return hashlib.sha256((text + hash_of(self._clusters)).encode()).hexdigest()

    @cached_property
    def probabilities(self) -> NDArray[np.float64] | None:
        """The probability with which each image is taken where it is met, [N]; None: all are taken.

        Raises:
            DataError: a file of clusters is damaged, or lacks an image.
        """
        if self._clusters is None:
            return None
        found: list[float] = []
        for images, count in self._parts:
            known = self._clusters.probabilities(_cluster_name(images))
            found += map(known.of, images.keys[:count])
        return np.array(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about the clusters, if there are any, each image of which is looked up."""
        return () if self._clusters is None or self.probabilities is None else (self._clusters.describe(),)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Each part's entry in a checkpoint's metadata."""
        return [
            {"path": images.location, "fingerprint": images.fingerprint, "count": count, "labels_used": False}
            for images, count in self._parts
        ]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self)

    def __len__(self) -> int:
        return sum(count for _, count in self._parts)

    def load(self, index: int) -> bytes | Tensor:
        """Return image `index` as a `View` takes it; raise DataError when it cannot be read."""
        images, index = self._find(index)
        return images.load(index)

    def where(self, index: int) -> str:
        """Return the part's path and the image's name in it."""
        images, index = self._find(index)
        return f"{images.location}/{images.keys[index]}"

    def open(self, stream: int, num_streams: int, place: Sequence[int], seed: int) -> SourceReader:
        """Open a stream's reader of them at a position."""
        return ImageReader(self, stream, num_streams, place, seed)

    def _find(self, index: int) -> tuple[StoredImages | SceneImages, int]:
        for images, count in self._parts:
            if index < count:
                return images, index
            index -= count
        raise IndexError(index)


@final
class ImageReader:
    """One stream's reader of images by number: shuffled in every epoch, dealt to the streams round-robin."""

    def __init__(
        self, images: ConcatImages, stream: int, num_streams: int, place: Sequence[int], seed: int
    ) -> None:
        self._images, self._stream, self._num_streams, self._seed = images, stream, num_streams, seed
        self._count, self._tried = images.count, int(place[0])
        self._probabilities, self._cluster_seed = images.probabilities, seed_of(seed, "cluster", 0)

    @property
    def place(self) -> tuple[int, int, int]:
        """Images tried, and two zeros."""
        return self._tried, 0, 0

    def close(self) -> None:
        """Do nothing: no file is open."""

    def take(self, view: View, stats: ReadStats) -> ShardSample:
        """Read a view of the next readable image.

        Raises:
            DataError: too many in a row are unreadable.
        """
        unreadable = 0
        while unreadable < _MAX_UNREADABLE:
            position = self._stream + self._tried * self._num_streams
            index = shuffled_index(position, self._count, self._seed)
            self._tried += 1
            if not self._takes(position, index):
                continue
            try:
                return ShardSample(view(self._images.load(index)), str(index))
            except DataError as error:
                stats.errors.append(ReadError("image", self._images.where(index), str(error)))
                last, unreadable = error, unreadable + 1
        raise DataError(f"{_MAX_UNREADABLE} images in a row cannot be read, the last: {last}; check the data")

    def _takes(self, position: int, index: int) -> bool:
        """Check whether an image is taken; those of large clusters are left more often."""
        if self._probabilities is None:
            return True
        return chance(self._cluster_seed, position) < float(self._probabilities[index])


class ShardStream:
    """One stream over all sources, mixed by their weights.

    The source that is furthest behind its weight comes next, so no count is ever more than two images away
    from its share; streams start with different credits, so that they do not all take the same source.

    Args:
        readers: the stream's reader of each source.
        weights: the sources' weights, of any sum.
        taken: images taken from each source so far.
        seed: decides the credits.
    """

    def __init__(
        self, readers: Sequence[SourceReader], weights: Sequence[float], taken: Sequence[int], seed: int
    ) -> None:
        self._readers, self._taken = readers, np.array(taken, np.int64)
        self._weights = np.array(weights) / sum(weights)
        self._credits = np.random.Generator(np.random.Philox(seed)).random(len(readers))

    def take(self, view: View, stats: ReadStats) -> ShardSample:
        """Read a view of the next image.

        Raises:
            DataError: the source that is due has no readable image left.
        """
        due = self._weights * (self._taken.sum() + 1) + self._credits - self._taken
        source = int(due.argmax())
        sample = self._readers[source].take(view, stats)
        self._taken[source] += 1
        return sample

    def close(self) -> None:
        """Close open files."""
        for reader in self._readers:
            reader.close()

    @property
    def cursor(self) -> Tensor:
        """The stream's cursor: int64 [S, 4]."""
        places = [(*reader.place, int(n)) for reader, n in zip(self._readers, self._taken, strict=True)]
        return torch.tensor(places, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamAssignment:
    """How the images of one group's batch are split over streams."""

    group: int  # index of the group in the run
    offset: int  # of its images in a step's batch
    images_per_step: int  # over all groups
    num_streams: int
    images_per_stream: int  # in a step

    def position(self, step: int, stream: int, index: int) -> int:
        """Return the position in the run of image `index` of a stream in a step."""
        first = step * self.images_per_step + self.offset
        return first + stream * self.images_per_stream + index

    def zeros(self, sources: int) -> Tensor:
        """Return the cursors of all streams before the first image: int64 [L, S, 4]."""
        return torch.zeros(self.num_streams, sources, CURSOR, dtype=torch.int64)

    def local(self, partition: Partition, rank: int) -> range:
        """Return the streams of one of the group's ranks; none for another rank."""
        group = partition.groups[self.group]
        if rank not in group.ranks:
            return range(0)
        rows = partition.rows(group, rank)
        start, stop = (row - group.first for row in (rows.start, rows.stop))
        return range(start // self.images_per_stream, stop // self.images_per_stream)


def assign_streams(config: TrainConfig, partition: Partition) -> tuple[StreamAssignment, ...]:
    """Assign streams to every group: the largest divisor of its batch up to `num_streams`.

    Raises:
        ConfigError: `num_streams` is below 1, or ranks cannot share the streams of their group evenly.
    """
    limit = config.data.num_streams
    if limit < 1:
        raise ConfigError(f"--data.num-streams {limit} cannot be; give 1 or more")
    assignments = []
    for index, group in enumerate(partition.groups):
        size, ranks = group.batch_size, len(group.ranks)
        num_streams = next(n for n in range(min(size, limit), 0, -1) if size % n == 0)
        if num_streams % ranks:
            raise ConfigError(
                f"the {num_streams} streams of {group.name} cannot be shared evenly by {ranks} ranks; they "
                f"are fixed for a run, so start as many ranks as divide {num_streams}, or begin anew with "
                f"--data.num-streams {size}"
            )
        assignments.append(
            StreamAssignment(
                group=index,
                offset=group.first,
                images_per_step=partition.batch_size,
                num_streams=num_streams,
                images_per_stream=size // num_streams,
            )
        )
    return tuple(assignments)


@final
class Sources:
    """The sources that a run's settings name, and the share of a batch of each."""

    def __init__(self, sources: Sequence[ReadableSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = sources, weights

    def __len__(self) -> int:
        return len(self._sources)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints, in order."""
        text = " ".join(source.fingerprint for source in self._sources)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Their entries in a checkpoint's metadata."""
        return [part for source in self._sources for part in source.sources]

    @property
    def count(self) -> int | None:
        """Number of images; None with shards, which are not counted beforehand."""
        counts = [source.count for source in self._sources]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the sources, in order."""
        return tuple(note for source in self._sources for note in source.notes)

    def open(self, assignment: StreamAssignment, stream: int, cursor: Tensor, seed: int) -> ShardStream:
        """Open the stream of a group's stream at a cursor [S, 4], in a run with this seed."""
        group_seed = seed_of(seed, "group", assignment.group)
        readers = [
            source.open(stream, assignment.num_streams, place[:-1], seed_of(group_seed, "source", index))
            for index, (source, place) in enumerate(zip(self._sources, cursor.tolist(), strict=True))
        ]
        taken = cursor[:, -1].tolist()
        return ShardStream(readers, self._weights, taken, seed_of(group_seed, "stream", stream))


_NO_DATA = "no data: give --data.shards 'FILES.tar', --data.images FOLDER or --data.scenes COUNT"


def open_sources(config: DataConfig) -> Sources:
    """Open a run's sources: one per pattern, folder and scenes with weights, else one for all.

    Raises:
        ConfigError: there are no data, the weights are not one positive number per source, or there are
            none although shards are mixed with other sources, or a setting of the clusters has no effect.
        DataError: a folder is missing or empty, or a file of clusters is.
    """
    parts = [*map(_open_folder, config.images), *_open_scenes(config)]
    balanced, shards = config.clusters, config.shards
    if not parts and not shards:
        raise ConfigError(_NO_DATA)
    if weights := config.weights:
        sources: list[ReadableSource] = [
            *(Shards(pattern, expand([pattern]), balanced) for pattern in shards),
            *(ConcatImages([part], balanced) for part in parts),
        ]
        if len(weights) != len(sources) or not min(weights) > 0 or not math.isfinite(sum(weights)):
            raise ConfigError(
                f"--data.weights {' '.join(map(str, weights))}: wanted a number above zero for each of the "
                f"{len(sources)} sources: the shards' patterns, the folders, then scenes"
            )
        return Sources(sources, weights)
    if parts and shards:
        raise ConfigError(
            "how many images shards hold is not known beforehand; beside folders or scenes give "
            "--data.weights, a number for each source: the shards' patterns, the folders, then scenes"
        )
    if shards:
        return Sources([Shards(" ".join(shards), expand(shards), balanced)], [1.0])
    return Sources([ConcatImages(parts, balanced)], [1.0])


def open_images(config: DataConfig, log: Callable[[str], None] = lambda line: None) -> ConcatImages:
    """Open the images that a run's settings name, to be read by number; shards must be local files.

    Raises:
        ConfigError: the settings name no images, or weights or clusters, which are not supported here.
        DataError: a folder or shard is missing, empty or damaged.
    """
    for name, given in {"weights": config.weights, "clusters": config.clusters != ClusterConfig()}.items():
        if given:
            raise ConfigError(f"a teacher cache takes every image alike; leave --data.{name} out")
    parts = [
        *map(_open_folder, config.shards),
        *map(_open_folder, config.images),
        *_open_scenes(config),
    ]
    if not parts:
        raise ConfigError(_NO_DATA)
    for part in parts:
        for note in part.images.notes:
            log(note)
    return ConcatImages(parts)


def _cluster_name(images: StoredImages | SceneImages) -> str:
    """Return the name of a part's file of clusters, without its ending: the folder's, or scenes."""
    return "scenes" if isinstance(images, SceneImages) else Path(images.location).name


def _open_folder(text: str | Path) -> Part:
    """Open the images of a folder or of local tar files; their hash is cached until a file changes.

    Raises:
        DataError: it is missing, empty or damaged.
    """
    listing = list_unlabelled(str(text))
    return Part(StoredImages(listing, default_cache() / "fingerprints"), len(listing.entries))


def _open_scenes(config: DataConfig) -> list[Part]:
    """Open the scenes, if any.

    Raises:
        ConfigError: a domain is given, but no scenes.
    """
    count, domain = config.scenes, config.scenes_domain
    if not count:
        if domain != "own":
            raise ConfigError(f"--data.scenes-domain {domain} has no effect without --data.scenes COUNT")
        return []
    return [Part(SceneImages("train", count=count, seed=config.scenes_seed, domain=domain), count)]

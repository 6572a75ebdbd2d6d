"""Cluster-balanced sampling: images of large clusters are taken more rarely, as in C-RADIOv2.

The clusters are the user's: a folder with a tab-separated file for every shard, or folder of images. An image
is met in its usual order, and taken with a probability of (m / n)^power, at most 1, where n is the size of
its cluster in the same source. With a power of 1 all clusters of m images or more are taken equally often. m
is the size of the smallest cluster, or larger, so that not too many images are met for each one that is
taken. Each pass over the data draws anew, from the run's seed and the image's position in the run.
"""

from __future__ import annotations

import bisect
import hashlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from pydantic import TypeAdapter

from radio.chunks import DamagedError, default_cache, read_records, write_records
from radio.errors import ConfigError, DataError, shown
from radio.io import MAX_DATA_BYTES, lines_of, read_text

from ..config import ClusterConfig

COLUMNS = ("key", "cluster")
_WORDS = 1 << 11  # a 64-bit hash over this has the 53 bits of a float


_COUNTED = TypeAdapter(tuple[str, dict[str, int]])


class Balance(NamedTuple):
    """With which probability images of each cluster are taken, and at which cost."""

    probabilities: dict[str, float]
    least: int  # m: smaller clusters count as if they had so many images
    met: float  # images met for each one that is taken


def balance(sizes: Mapping[str, int], config: ClusterConfig) -> Balance:
    """Compute the probabilities for clusters of these sizes, each above 0, and the images met."""
    counts = np.array(list(sizes.values()), dtype=np.float64)

    def taken(least: int) -> float:
        return float((counts * np.minimum(1.0, least / counts) ** config.power).sum() / counts.sum())

    candidates = range(int(counts.min()), int(counts.max()) + 1)
    enough = bisect.bisect_left(candidates, True, key=lambda m: taken(m) >= 1 / config.max_met)
    least = candidates[enough]
    probabilities = np.minimum(1.0, least / counts) ** config.power
    return Balance(dict(zip(sizes, probabilities.tolist(), strict=True)), least, 1 / taken(least))


def chance(seed: int, position: int, index: int = 0) -> float:
    """Draw a number in [0, 1) for the image at a position of the run, or image `index` of a shard at one."""
    digest = hashlib.blake2b(struct.pack(">QQQ", seed, position, index), digest_size=8).digest()
    return (int.from_bytes(digest) // _WORDS) / (1 << 53)


@lru_cache(maxsize=8)  # parts of one shard are read by several streams
def read_clusters(path: Path) -> dict[str, str]:
    """Read a cluster file, or return what was read before; see `parse_clusters`."""
    return parse_clusters(path)


def parse_clusters(path: Path) -> dict[str, str]:
    """Read each image's cluster from a file, by its key.

    Raises:
        DataError: it is absent, empty, not UTF-8, lacks a column, or a key is there twice.
    """
    wanted = f"wanted a first line with {' and '.join(COLUMNS)}, separated by a tab, then a line per image"
    lines = lines_of(read_text(path, limit=MAX_DATA_BYTES))
    names = lines[0].split("\t") if lines else []
    if any(names.count(column) != 1 for column in COLUMNS):
        what = f"its first line is {lines[0][:200]!r}" if lines else "an empty file"
        raise DataError(f"{shown(path)}: {what}; {wanted}")
    if len(lines) == 1:
        raise DataError(f"{shown(path)}: no line follows its first; {wanted}")
    key_at, cluster_at = map(names.index, COLUMNS)
    clusters: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(names) or not fields[key_at] or not fields[cluster_at]:
            raise DataError(
                f"{shown(path)}: line {number} is {line[:200]!r}; wanted a key and a cluster in "
                f"{len(names)} columns, as its first line names them"
            )
        if fields[key_at] in clusters:
            raise DataError(f"{shown(path)}: line {number} has the key {shown(fields[key_at])} once more")
        clusters[fields[key_at]] = fields[cluster_at]
    return clusters


@final
class Clusters:
    """The clusters of the images of one source, among which they are balanced.

    Args:
        config: the folder of the files, and how to balance.
        names: of the source's shards or folders of images, without an ending.

    Raises:
        DataError: the folder lacks a file, or two shards or folders have one name.
    """

    def __init__(self, config: ClusterConfig, names: Sequence[str]) -> None:
        assert config.folder is not None
        self._config, self._folder, self._names = config, config.folder, tuple(names)
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise DataError(
                f"--data.clusters.folder: two shards or folders have the name {shown(twice)}, and so one "
                f"file of clusters; rename one, or give each source a share by --data.weights"
            )
        absent = [path for path in map(self._path, names) if not path.is_file()]
        if absent:
            raise DataError(
                f"--data.clusters.folder: {shown(absent[0])} is not there, nor are {len(absent) - 1} of the "
                f"other {len(names) - 1}; wanted a file for every shard, folder of images and scenes"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the files' content."""
        return self._counted[0]

    @cached_property
    def balance(self) -> Balance:
        """The probability of an image of each cluster."""
        return balance(self._counted[1], self._config)

    def describe(self) -> str:
        """Format the clusters' number and sizes, and the cost of balancing them."""
        sizes, (_, least, met) = self._counted[1].values(), self.balance
        small = f"; those below {least} count as if they had {least}" if least > min(sizes) else ""
        return (
            f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} images: {met:.3g} images are met for "
            f"each one that is taken{small}"
        )

    def probabilities(self, name: str) -> Probabilities:
        """Return the probabilities of the images of a shard or folder.

        Raises:
            DataError: as `read_clusters`.
        """
        path = self._path(name)
        return Probabilities(path, read_clusters(path), self.balance.probabilities)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.tsv"

    @cached_property
    def _counted(self) -> tuple[str, dict[str, int]]:
        """The hash and the clusters' sizes, which a memo keeps until a file's size or time changes."""
        paths = [self._path(name) for name in self._names]
        states = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
        signature = hashlib.sha256("\n".join(states).encode("utf-8", "surrogateescape")).hexdigest()
        memo = default_cache() / "clusters" / f"{signature}.jsonl"
        with suppress(DamagedError, ValueError):
            if memo.exists():
                (counted,) = read_records(memo, _COUNTED)
                return counted
        sha, sizes = hashlib.sha256(), Counter[str]()
        for name, path in zip(self._names, paths, strict=True):
            clusters = parse_clusters(path)
            sizes.update(clusters.values())
            lines = (f"{key}\t{cluster}\n" for key, cluster in clusters.items())
            sha.update(f"{name}\n{''.join(lines)}".encode("utf-8", "surrogateescape"))
        write_records(memo, [(sha.hexdigest(), dict(sizes))])
        return sha.hexdigest(), dict(sizes)


class Probabilities(NamedTuple):
    """With which probability each image of a shard or folder is taken."""

    path: Path
    clusters: dict[str, str]  # by key
    by_cluster: dict[str, float]

    def of(self, key: str) -> float:
        """Return an image's probability.

        Raises:
            DataError: the file has no such key, or has changed since the clusters were counted.
        """
        cluster = self.clusters.get(key)
        if cluster is None:
            raise DataError(f"{shown(self.path)}: has no line for the image {shown(key)}; add its cluster")
        if cluster not in self.by_cluster:
            raise DataError(f"{shown(self.path)}: was changed while the run reads it; start the run again")
        return self.by_cluster[cluster]


def make_clusters(config: ClusterConfig, names: Sequence[str]) -> Clusters | None:
    """Open the clusters of a source; None where the run does not balance.

    Raises:
        ConfigError: a setting is without effect.
        DataError: as `Clusters`.
    """
    if config.folder is not None:
        return Clusters(config, names)
    if config != ClusterConfig():
        raise ConfigError(
            "--data.clusters.power and --data.clusters.max-met are for --data.clusters.folder; leave them "
            "out, or give the folder of the clusters' files"
        )
    return None


def hash_of(clusters: Clusters | None) -> str:
    """Return what clusters, if any, add to a source's fingerprint: a space and their own."""
    return "" if clusters is None else f" {clusters.fingerprint}"

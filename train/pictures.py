"""The pictures of a run: folders, shards and the generated world, one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

from torch import Tensor

from evals.core.data import SceneImages
from evals.core.features import default_cache
from evals.core.stored import StoredImages, list_unlabelled
from radio.errors import ConfigError

from .config import DataConfig

NO_DATA = "no data: give --data.shards 'FILES.tar', --data.images FOLDER or --data.scenes COUNT"


class Described(Protocol):
    """What a checkpoint's card says of the data."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of what the pictures are."""

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Their parts: path, fingerprint, how many."""

    @property
    def count(self) -> int | None:
        """Pictures in all; None where that is not known before they are read."""


class Pictures(Described, Protocol):
    """Pictures by number."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, index: int) -> Tensor:
        """Picture `index` as uint8 [3, H, W]; DataError when it cannot be read."""

    def where(self, index: int) -> str:
        """Where picture `index` lies."""


class Stored(Protocol):
    """One part of the data, as the evaluators' readers give it."""

    @property
    def location(self) -> str:
        """Where it lies."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The pictures' names."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of it, and why."""

    @property
    def fingerprint(self) -> str:
        """A hash of its content."""

    def read(self, index: int) -> Tensor:
        """The picture, uint8 [3, H, W]; DataError when it cannot be decoded."""


class Part(NamedTuple):
    """A part of the data and how many pictures it holds."""

    stored: Stored
    pictures: int


@final
class Joined:
    """Several sources counted through; the labels that some of them have are never read."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the parts' content, in order; computed once."""
        if self._fingerprint is None:
            text = " ".join(f"{source.fingerprint} {count}" for source, count in self._parts)
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What a checkpoint's card says of each part."""
        return [
            {"path": source.location, "fingerprint": source.fingerprint, "count": count, "labels_used": False}
            for source, count in self._parts
        ]

    @property
    def count(self) -> int:
        """Pictures in all."""
        return len(self)

    def __len__(self) -> int:
        """Pictures in all."""
        return sum(count for _, count in self._parts)

    def read(self, index: int) -> Tensor:
        """Picture `index` as uint8 [3, H, W]; DataError when it cannot be decoded."""
        stored, number = self._find(index)
        return stored.read(number)

    def where(self, index: int) -> str:
        """The part's place and the picture's name there."""
        stored, number = self._find(index)
        return f"{stored.location}/{stored.keys[number]}"

    def _find(self, index: int) -> tuple[Stored, int]:
        for stored, count in self._parts:
            if index < count:
                return stored, index
            index -= count
        raise IndexError(index)


def _ignore(line: str) -> None:
    """Tell nobody."""


def open_pictures(config: DataConfig, tell: Callable[[str], None] = _ignore) -> Joined:
    """The pictures that a run's settings name, each to be read by number; shards have to be files.

    Raises:
        ConfigError: they name none, or weights, which pictures by number do not know.
        DataError: a folder or shard that is absent, empty or damaged.
    """
    if config.weights:
        raise ConfigError("a teacher cache takes every picture alike; leave --data.weights out")
    parts = [*map(folder_part, config.shards), *map(folder_part, config.images)]
    parts += [scenes_part(config)] if config.scenes else []
    if not parts:
        raise ConfigError(NO_DATA)
    for part in parts:
        for note in part.stored.notes:
            tell(note)
    return Joined(parts)


def folder_part(text: str | Path) -> Part:
    """The pictures of a folder, or of tar files on this machine; their hash is kept until a file changes.

    Raises:
        DataError: absent, empty or damaged.
    """
    listing = list_unlabelled(str(text))
    return Part(StoredImages(listing, default_cache() / "fingerprints"), len(listing.entries))


def scenes_part(config: DataConfig) -> Part:
    """Pictures of the generated world."""
    return Part(SceneImages("train", count=config.scenes, seed=config.scenes_seed), config.scenes)

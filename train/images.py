"""The images of a run by number: folders, local shards and the generated world, concatenated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

from torch import Tensor

from radio.chunks import default_cache
from radio.data import SceneImages
from radio.errors import ConfigError
from radio.image_files import StoredImages, list_unlabelled

from .config import DataConfig

NO_DATA = "no data: give --data.shards 'FILES.tar', --data.images FOLDER or --data.scenes COUNT"


class DatasetInfo(Protocol):
    """Description of the data for a checkpoint's metadata."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of the images."""

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The parts of the data: path, fingerprint, count."""

    @property
    def count(self) -> int | None:
        """Number of images; None if it is not known before they are read."""


class Images(DatasetInfo, Protocol):
    """Images by number."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, index: int) -> Tensor:
        """Read image `index` as uint8 [3, H, W]; raise DataError when it cannot be read."""

    def where(self, index: int) -> str:
        """Return the location of image `index`."""


class ImageFiles(Protocol):
    """One part of the data, as the evaluators' readers return it."""

    @property
    def location(self) -> str:
        """Its path."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The images' names."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about skipped files, with the reasons."""

    @property
    def fingerprint(self) -> str:
        """A hash of its content."""

    def read(self, index: int) -> Tensor:
        """Read image `index` as uint8 [3, H, W]; raise DataError when it cannot be decoded."""


class Part(NamedTuple):
    """A part of the data and its number of images."""

    stored: ImageFiles
    images: int


@final
class ConcatImages:
    """Several parts concatenated; labels are never read."""

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
        """Each part's entry in a checkpoint's metadata."""
        return [
            {"path": source.location, "fingerprint": source.fingerprint, "count": count, "labels_used": False}
            for source, count in self._parts
        ]

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self)

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(count for _, count in self._parts)

    def read(self, index: int) -> Tensor:
        """Read image `index` as uint8 [3, H, W]; raise DataError when it cannot be decoded."""
        stored, number = self._find(index)
        return stored.read(number)

    def where(self, index: int) -> str:
        """Return the part's path and the image's name in it."""
        stored, number = self._find(index)
        return f"{stored.location}/{stored.keys[number]}"

    def _find(self, index: int) -> tuple[ImageFiles, int]:
        for stored, count in self._parts:
            if index < count:
                return stored, index
            index -= count
        raise IndexError(index)


def _ignore(line: str) -> None:
    """Ignore the line."""


def open_images(config: DataConfig, tell: Callable[[str], None] = _ignore) -> ConcatImages:
    """Open the images that a run's settings name, to be read by number; shards must be local files.

    Raises:
        ConfigError: the settings name no images, or weights, which are not supported here.
        DataError: a folder or shard is missing, empty or damaged.
    """
    if config.weights:
        raise ConfigError("a teacher cache takes every image alike; leave --data.weights out")
    parts = [*map(folder_part, config.shards), *map(folder_part, config.images)]
    parts += [scenes_part(config)] if config.scenes else []
    if not parts:
        raise ConfigError(NO_DATA)
    for part in parts:
        for note in part.stored.notes:
            tell(note)
    return ConcatImages(parts)


def folder_part(text: str | Path) -> Part:
    """Open the images of a folder or of local tar files; their hash is cached until a file changes.

    Raises:
        DataError: it is missing, empty or damaged.
    """
    listing = list_unlabelled(str(text))
    return Part(StoredImages(listing, default_cache() / "fingerprints"), len(listing.entries))


def scenes_part(config: DataConfig) -> Part:
    """Open the images of the generated world."""
    return Part(SceneImages("train", count=config.scenes, seed=config.scenes_seed), config.scenes)

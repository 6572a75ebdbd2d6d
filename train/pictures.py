"""The pictures of a run: folders, shards and the generated world, one after another."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol, final

from torch import Tensor

from evals.core.data import SceneImages
from evals.core.stored import StoredImages, list_unlabelled
from radio.errors import ConfigError

from .config import DataConfig


class Source(Protocol):
    """One part of the data, as the evaluators' readers give it."""

    @property
    def location(self) -> str:
        """Where it lies."""

    @property
    def fingerprint(self) -> str:
        """A hash of its content."""

    def read(self, index: int) -> Tensor:
        """The picture, uint8 [3, H, W]; DataError when it cannot be decoded."""


@final
class Joined:
    """Several sources counted through; the labels that some of them have are never read."""

    def __init__(self, parts: list[tuple[Source, int]]) -> None:
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

    def __len__(self) -> int:
        """Pictures in all."""
        return sum(count for _, count in self._parts)

    def read(self, index: int) -> Tensor:
        """Picture `index` as uint8 [3, H, W]; DataError when it cannot be decoded."""
        for source, count in self._parts:
            if index < count:
                return source.read(index)
            index -= count
        raise IndexError(index)


def open_pictures(config: DataConfig) -> Joined:
    """The pictures that a run's settings name.

    Raises:
        ConfigError: they name none.
        DataError: a folder or shard that is absent, empty or damaged.
    """
    parts: list[tuple[Source, int]] = []
    for text in (*config.shards, *map(str, config.images)):
        listing = list_unlabelled(text)
        parts.append((StoredImages(listing), len(listing.entries)))
    if config.scenes:
        parts.append((SceneImages("train", count=config.scenes, seed=config.scenes_seed), config.scenes))
    if not parts:
        raise ConfigError(
            "no data: give --data.shards 'FILES.tar', --data.images FOLDER or --data.scenes COUNT"
        )
    return Joined(parts)

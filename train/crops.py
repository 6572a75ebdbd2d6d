"""Random crops of pictures, each a function of the seed and its place in the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from radio.errors import DataError
from radio.images import crop_and_resize, sample_crop

from .config import DataConfig
from .sampling import generator, picture_at

T = TypeVar("T")

_TRIES = 20  # pictures in a row that may be broken before a crop is given up


class Pictures(Protocol):
    """Pictures by number."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of what the pictures are."""

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Their parts, as a checkpoint's card names them."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, index: int) -> Tensor:
        """Picture `index` as uint8 [3, H, W]; DataError when it cannot be read."""


class Crop(NamedTuple):
    """One training view."""

    pixels: Tensor  # uint8 [3, side, side]
    broken: int  # pictures skipped on the way to it


def random_view(image: Tensor, config: DataConfig, side: int, seed: int, number: int) -> Tensor:
    """View `number` of a run with this seed: uint8 [3, H, W] -> uint8 [3, side, side].

    A RandomResizedCrop and a flip, drawn from seed and number alone; every model sees the same.
    """
    source = generator(seed, "crop", number)
    box = sample_crop(image.shape[1], image.shape[2], config.crop_scale, config.crop_aspect, source)
    pixels = crop_and_resize(image, box, (side, side)).mul(255).round_().to(torch.uint8)
    flipped = float(torch.rand((), generator=source)) < config.flip
    return pixels.flip(-1) if flipped else pixels


class RandomCrops(Dataset[Crop]):
    """The endless shuffled stream of RandomResizedCrops, by position; all models see the same crop.

    Args:
        pictures: where they come from.
        config: crop and flip settings.
        side: pixels of the square crop: the largest resolution of the run.
        seed: decides order and crops.
    """

    def __init__(self, pictures: Pictures, config: DataConfig, side: int, seed: int) -> None:
        self.pictures, self.config, self.side, self.seed = pictures, config, side, seed

    def __getitem__(self, position: int) -> Crop:
        """The crop at a position of the stream."""
        return self.crop(picture_at(position, len(self.pictures), self.seed), position)

    def crop(self, index: int, number: int) -> Crop:
        """Crop `number` taken from picture `index`, or from the next one that can be read.

        Raises:
            DataError: too many pictures in a row are broken.
        """
        for broken in range(_TRIES):
            try:
                image = self.pictures.read((index + broken) % len(self.pictures))
            except DataError as error:
                last = error
                continue
            return Crop(self._view(image, number), broken)
        raise DataError(
            f"{_TRIES} pictures in a row cannot be read, the last: {last}; check the data"
        ) from last

    def _view(self, image: Tensor, number: int) -> Tensor:
        return random_view(image, self.config, self.side, self.seed, number)


class FixedCrops(Dataset[Crop]):
    """A finite set of crops for the teacher cache: `crops` of each of the first `count` pictures."""

    def __init__(self, source: RandomCrops, count: int, crops: int) -> None:
        self.source, self.count, self.crops = source, count, crops

    def __len__(self) -> int:
        return self.count * self.crops

    def __getitem__(self, entry: int) -> Crop:
        """Crop `entry`: the pictures in turn, all of them once before any a second time."""
        return self.source.crop(entry % self.count, entry)


def rows_of(loader: Iterable[T]) -> Iterator[T]:
    """What a loader gives; a picture error of one of its processes comes without a traceback around it."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from error


def check_broken(broken: int, seen: int, config: DataConfig) -> None:
    """None, while few enough of the pictures seen were broken.

    Raises:
        DataError: their share is beyond the settings' (ten are always let through).
    """
    if broken > max(10, config.max_broken * seen):
        raise DataError(
            f"{broken} of {seen} pictures cannot be read; mend the data or raise --data.max-broken"
        )

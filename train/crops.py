"""Random crops of pictures, each a function of the seed and its place in the run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from radio.errors import DataError
from radio.images import crop_and_resize, sample_crop

from .config import DataConfig
from .pictures import Pictures
from .sampling import generator

_TRIES = 20  # pictures in a row that may be broken before a crop is given up


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


class FixedCrops(Dataset[Crop]):
    """A finite set of crops for the teacher cache: `crops` of each of the first `count` pictures.

    Args:
        pictures: where they come from.
        config: crop and flip settings.
        side: pixels of the square crop.
        seed: decides the crops.
        count: pictures, the first of all.
        crops: of each.
    """

    def __init__(
        self, pictures: Pictures, config: DataConfig, side: int, seed: int, count: int, crops: int
    ) -> None:
        self.pictures, self.config, self.side, self.seed = pictures, config, side, seed
        self.count, self.crops = count, crops

    def __len__(self) -> int:
        return self.count * self.crops

    def __getitem__(self, entry: int) -> Crop:
        """Crop `entry`: the pictures in turn, all of them once before any a second time.

        Where a picture is broken the next one that can be read stands in for it.

        Raises:
            DataError: too many pictures in a row are broken.
        """
        index = entry % self.count
        for broken in range(_TRIES):
            try:
                image = self.pictures.read((index + broken) % len(self.pictures))
            except DataError as error:
                last = error
                continue
            return Crop(random_view(image, self.config, self.side, self.seed, entry), broken)
        raise DataError(
            f"{_TRIES} pictures in a row cannot be read, the last: {last}; check the data"
        ) from last

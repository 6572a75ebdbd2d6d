"""Random crops of images; each depends only on the seed and its position in the run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from radio.errors import DataError
from radio.images import crop_and_resize, sample_crop

from .config import DataConfig
from .images import Images
from .sampling import generator

_TRIES = 20  # broken images in a row before a crop fails


class Crop(NamedTuple):
    """One training view."""

    pixels: Tensor  # uint8 [3, side, side]
    broken: int  # unreadable images skipped before this one


def random_view(image: Tensor, config: DataConfig, side: int, seed: int, number: int) -> Tensor:
    """Crop view `number` of a run with this seed: uint8 [3, H, W] -> uint8 [3, side, side].

    A RandomResizedCrop and a flip, drawn from seed and number only; every model sees the same view.
    """
    source = generator(seed, "crop", number)
    box = sample_crop(image.shape[1], image.shape[2], config.crop_scale, config.crop_aspect, source)
    pixels = crop_and_resize(image, box, (side, side)).mul(255).round_().to(torch.uint8)
    flipped = float(torch.rand((), generator=source)) < config.flip
    return pixels.flip(-1) if flipped else pixels


class FixedCrops(Dataset[Crop]):
    """A finite set of crops for the teacher cache: `crops` of each of the first `count` images.

    Args:
        images: source of the crops.
        config: crop and flip settings.
        side: pixels of the square crop.
        seed: decides the crops.
        count: number of images, from the first on.
        crops: number of crops per image.
    """

    def __init__(
        self, images: Images, config: DataConfig, side: int, seed: int, count: int, crops: int
    ) -> None:
        self.images, self.config, self.side, self.seed = images, config, side, seed
        self.count, self.crops = count, crops

    def __len__(self) -> int:
        return self.count * self.crops

    def __getitem__(self, entry: int) -> Crop:
        """Return crop `entry`: each image is cropped once before any is cropped a second time.

        A broken image is replaced by the next readable one.

        Raises:
            DataError: too many images in a row are broken.
        """
        index = entry % self.count
        for broken in range(_TRIES):
            try:
                image = self.images.read((index + broken) % len(self.images))
            except DataError as error:
                last = error
                continue
            return Crop(random_view(image, self.config, self.side, self.seed, entry), broken)
        raise DataError(
            f"{_TRIES} images in a row cannot be read, the last: {last}; check the data"
        ) from last

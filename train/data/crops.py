"""Random draws of a run, each a function of the seed and a position only, and the crops drawn by them.

No draw depends on batch size, workers or ranks, and a resumed run draws the same as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from radio.errors import DataError
from radio.images import crop_and_resize, decode_crop, sample_crop

from ..config import DataConfig

if TYPE_CHECKING:
    from .streams import ConcatImages

_MAX_UNREADABLE = 20  # images in a row before a crop fails

Purpose = Literal[
    "order",
    "crop",
    "positions",
    "window",
    "group",
    "source",
    "stream",
    "mosaic",
    "stage",
    "resolution",
    "shift",
    "damp",
    "cluster",
]
View = Callable[[bytes | Tensor], Tensor]  # crops an image, given as a file's bytes or uint8 [3, H, W]

_STREAMS: dict[Purpose, int] = {name: number for number, name in enumerate(get_args(Purpose))}


def seed_of(seed: int, purpose: Purpose, index: int) -> int:
    """Derive a 63-bit seed for one purpose at one position of the run."""
    words = np.random.SeedSequence((seed, _STREAMS[purpose], index)).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def generator(seed: int, purpose: Purpose, index: int) -> torch.Generator:
    """Create a CPU generator for one purpose at one position of the run."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))


def shuffled_index(position: int, count: int, seed: int) -> int:
    """Return which of `count` images is at a position of the endless stream, shuffled per epoch."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


@lru_cache(maxsize=16)  # streams may be in different epochs of different sources
def _order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.Generator(np.random.Philox(seed_of(seed, "order", epoch))).permutation(count)


def draw_window(candidates: tuple[int, ...], seed: int, step: int) -> int | None:
    """Sample the attention window of a step uniformly from the candidates; None if there are none."""
    if not candidates:
        return None
    pick = torch.randint(len(candidates), (), generator=generator(seed, "window", step))
    return candidates[int(pick)]


def random_view(image: bytes | Tensor, config: DataConfig, side: int, seed: int, number: int) -> Tensor:
    """Crop view `number` of a run with this seed: uint8 [3, side, side].

    A RandomResizedCrop and a flip, drawn from seed and number only; every model sees the same view.

    Args:
        image: a file's bytes, or uint8 [3, H, W].
        config: crop and flip settings.
        side: pixels of the square crop.
        seed: the run's.
        number: position of the view in the run.

    Raises:
        DataError: the file cannot be decoded.
    """
    source = generator(seed, "crop", number)
    sample = partial(sample_crop, scale=config.crop_scale, ratio=config.crop_aspect, generator=source)
    if isinstance(image, Tensor):
        pixels = crop_and_resize(image, sample(image.shape[1], image.shape[2]), (side, side))
    else:
        pixels = decode_crop(image, sample, (side, side))
    flipped = float(torch.rand((), generator=source)) < config.flip
    return (pixels.flip(-1) if flipped else pixels).contiguous()


class Crop(NamedTuple):
    """One training view."""

    pixels: Tensor  # uint8 [3, side, side]
    broken: int  # unreadable images skipped before this one


class FixedCrops(Dataset[Crop]):
    """A finite set of crops: `crops` of each of the first `count` images.

    Args:
        images: source of the crops.
        config: crop and flip settings.
        side: pixels of the square crop.
        seed: decides the crops.
        count: number of images, from the first on.
        crops: number of crops per image.
    """

    def __init__(
        self, images: ConcatImages, config: DataConfig, side: int, seed: int, count: int, crops: int
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
        for broken in range(_MAX_UNREADABLE):
            try:
                image = self.images.load((entry % self.count + broken) % len(self.images))
                return Crop(random_view(image, self.config, self.side, self.seed, entry), broken)
            except DataError as error:
                last = error
        raise DataError(
            f"{_MAX_UNREADABLE} images in a row cannot be read, the last: {last}; check the data"
        ) from last

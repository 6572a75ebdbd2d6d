"""Random draws of a run, each a function of the seed and a position only, and the crops drawn by them.

No draw depends on batch size, workers or ranks, and a resumed run draws the same as an uninterrupted one."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from radio.images import crop_and_resize, sample_crop

from ..config import DataConfig

Purpose = Literal["order", "crop", "positions", "window", "group", "source", "lane"]
_STREAMS: dict[Purpose, int] = {name: number for number, name in enumerate(get_args(Purpose))}


def seed_of(seed: int, purpose: Purpose, index: int) -> int:
    """Derive a 63-bit seed for one purpose at one position of the run."""
    words = np.random.SeedSequence((seed, _STREAMS[purpose], index)).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def generator(seed: int, purpose: Purpose, index: int) -> torch.Generator:
    """Create a CPU generator for one purpose at one position of the run."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))


def image_at(position: int, count: int, seed: int) -> int:
    """Return which of `count` images is at a position of the endless stream, shuffled per epoch."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


@lru_cache(maxsize=16)  # lanes may be in different epochs of different sources
def _order(seed: int, epoch: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.Generator(np.random.Philox(seed_of(seed, "order", epoch))).permutation(count)


def draw_window(candidates: tuple[int, ...], seed: int, step: int) -> int | None:
    """Sample the attention window of a step uniformly from the candidates; None if there are none."""
    if not candidates:
        return None
    pick = torch.randint(len(candidates), (), generator=generator(seed, "window", step))
    return candidates[int(pick)]


def random_view(image: Tensor, config: DataConfig, side: int, seed: int, number: int) -> Tensor:
    """Crop view `number` of a run with this seed: uint8 [3, H, W] -> uint8 [3, side, side].

    A RandomResizedCrop and a flip, drawn from seed and number only; every model sees the same view.
    """
    source = generator(seed, "crop", number)
    box = sample_crop(image.shape[1], image.shape[2], config.crop_scale, config.crop_aspect, source)
    pixels = crop_and_resize(image, box, (side, side)).mul(255).round_().to(torch.uint8)
    flipped = float(torch.rand((), generator=source)) < config.flip
    return pixels.flip(-1) if flipped else pixels

"""Crops are a function of seed and number; broken images are stood in for, and not endured for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from radio.errors import DataError
from radio.images import crop_and_resize, sample_crop
from train.config import DataConfig
from train.data.crops import FixedCrops, generator, random_view


class Drawn:
    """Images of numbers, some of them broken."""

    fingerprint = "drawn"

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.count, self.broken = count, broken
        self.sources: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Tensor:
        if index in self.broken:
            raise DataError(f"image {index} is damaged")
        pixels = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(index))
        return pixels.to(torch.uint8)

    def where(self, index: int) -> str:
        return str(index)


def test_a_view_is_a_random_resized_crop() -> None:
    config = DataConfig(crop_scale=(0.3, 0.8), flip=0.0)
    for number in range(8):
        image = Drawn(6).load(number % 6)
        box = sample_crop(40, 60, (0.3, 0.8), config.crop_aspect, generator(9, "crop", number))
        view = random_view(image, config, 20, 9, number)
        assert view.dtype == torch.uint8
        assert torch.equal(view, crop_and_resize(image, box, (20, 20)))


def test_another_seed_and_another_number_give_other_views() -> None:
    image = Drawn(1).load(0)
    views = [random_view(image, DataConfig(), 16, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    assert torch.equal(views[0], random_view(image, DataConfig(), 16, 0, 0))


def test_flips_mirror_the_same_crop() -> None:
    flipped = 0
    for number in range(200):
        image = Drawn(4).load(number % 4)
        plain, mirrored, sometimes = (
            random_view(image, DataConfig(flip=probability), 16, 1, number) for probability in (0.0, 1.0, 0.5)
        )
        assert torch.equal(plain.flip(-1), mirrored)
        flipped += torch.equal(sometimes, mirrored)
    assert 70 < flipped < 130  # four standard deviations


def test_fixed_crops_take_the_images_in_turn() -> None:
    images, config = Drawn(9), DataConfig(flip=0.0)
    fixed = FixedCrops(images, config, 16, 2, 4, 3)
    assert len(fixed) == 12
    for entry in range(12):
        assert torch.equal(fixed[entry].pixels, random_view(images.load(entry % 4), config, 16, 2, entry))
    assert not torch.equal(fixed[0].pixels, fixed[4].pixels)  # two crops of one image


def test_the_next_image_stands_in_for_a_broken_one() -> None:
    config = DataConfig(flip=0.0)
    crops = FixedCrops(Drawn(6, frozenset({1, 2, 5})), config, 16, 0, 6, 1)
    assert [crops[index].broken for index in range(6)] == [0, 2, 1, 0, 0, 1]
    assert torch.equal(crops[1].pixels, random_view(Drawn(6).load(3), config, 16, 0, 1))
    assert torch.equal(crops[5].pixels, random_view(Drawn(6).load(0), config, 16, 0, 5))


def test_broken_images_alone_are_one_clear_error() -> None:
    crops = FixedCrops(Drawn(3, frozenset(range(3))), DataConfig(), 16, 0, 3, 1)
    with pytest.raises(DataError, match=r"^20 images in a row cannot be read, the last: .*; check the data$"):
        _ = crops[0]

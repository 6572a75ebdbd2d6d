"""Crops are a function of seed and place; broken pictures are skipped, counted, and not endured for ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from radio.errors import DataError
from radio.images import crop_and_resize, sample_crop
from train.config import DataConfig
from train.crops import Crop, FixedCrops, RandomCrops, check_broken, rows_of
from train.sampling import StepSampler, generator, picture_at


class Drawn:
    """Pictures of numbers, some of them broken."""

    fingerprint = "drawn"

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.count, self.broken = count, broken
        self.sources: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        if index in self.broken:
            raise DataError(f"picture {index} is damaged")
        pixels = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(index))
        return pixels.to(torch.uint8)


def stream(crops: RandomCrops, workers: int, batch_size: int, start: int = 0) -> Tensor:
    """The pixels of positions `start`..12 as a loader gives them."""
    sampler = StepSampler(start // batch_size, 12 // batch_size, batch_size, range(batch_size))
    loader = DataLoader(crops, batch_sampler=sampler, num_workers=workers)
    return torch.cat([batch.pixels for batch in loader])


def test_crops_do_not_depend_on_workers_batches_or_start() -> None:
    crops = RandomCrops(Drawn(5), DataConfig(), 16, 3)
    wanted = torch.stack([crops[position].pixels for position in range(12)])
    assert wanted.shape == (12, 3, 16, 16)
    assert wanted.dtype == torch.uint8
    for workers, batch_size in ((0, 4), (1, 6), (2, 3)):
        assert torch.equal(stream(crops, workers, batch_size), wanted)
    assert torch.equal(stream(crops, 0, 4, start=8), wanted[8:])


def test_another_seed_and_another_epoch_give_other_crops() -> None:
    pictures = Drawn(1)
    streams = [RandomCrops(pictures, DataConfig(), 16, seed) for seed in (0, 1)]
    crops = [crops[place].pixels for crops in streams for place in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


def test_a_crop_is_a_random_resized_crop() -> None:
    pictures, config = Drawn(6), DataConfig(crop_scale=(0.3, 0.8), flip=0.0)
    crops = RandomCrops(pictures, config, 20, 9)
    for position in range(8):
        image = pictures.read(picture_at(position, 6, 9))
        box = sample_crop(40, 60, (0.3, 0.8), config.crop_aspect, generator(9, "crop", position))
        wanted = (crop_and_resize(image, box, (20, 20)) * 255).round().to(torch.uint8)
        assert torch.equal(crops[position].pixels, wanted)


def test_flips_mirror_the_same_crop() -> None:
    never, always, sometimes = (
        RandomCrops(Drawn(4), DataConfig(flip=probability), 16, 1) for probability in (0.0, 1.0, 0.5)
    )
    flipped = 0
    for position in range(200):
        plain, mirrored = never[position].pixels, always[position].pixels
        assert torch.equal(plain.flip(-1), mirrored)
        flipped += torch.equal(sometimes[position].pixels, mirrored)
    assert 70 < flipped < 130  # four standard deviations


def test_broken_pictures_are_skipped_and_counted() -> None:
    crops = RandomCrops(Drawn(6, frozenset({1, 2})), DataConfig(flip=0.0), 16, 0)
    whole = RandomCrops(Drawn(6), DataConfig(flip=0.0), 16, 0)
    assert [crops.crop(index, 0).broken for index in range(6)] == [0, 2, 1, 0, 0, 0]
    assert torch.equal(crops.crop(1, 5).pixels, whole.crop(3, 5).pixels)
    assert crops.crop(5, 0).broken == 0
    around = RandomCrops(Drawn(4, frozenset({3})), DataConfig(flip=0.0), 16, 0)
    assert torch.equal(around.crop(3, 5).pixels, around.crop(0, 5).pixels)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pictures_alone_are_one_clear_error(workers: int) -> None:
    crops = RandomCrops(Drawn(3, frozenset(range(3))), DataConfig(), 16, 0)
    with pytest.raises(DataError) as caught:
        list(rows_of(DataLoader(crops, batch_sampler=StepSampler(0, 1, 2, range(2)), num_workers=workers)))
    assert str(caught.value).startswith("20 pictures in a row cannot be read, the last: picture ")
    assert str(caught.value).endswith(" is damaged; check the data")


def test_rows_pass_through_one_by_one() -> None:
    def rows() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("the third is damaged")

    found: list[int] = []
    with pytest.raises(DataError, match=r"^the third is damaged$"):
        found.extend(rows_of(rows()))
    given = rows_of(rows())
    assert (next(given), next(given)) == (1, 2)


@pytest.mark.parametrize(("broken", "seen", "fine"), [(10, 10, True), (11, 12, False), (11, 1100, True)])
def test_a_share_of_broken_pictures_is_let_through(broken: int, seen: int, fine: bool) -> None:
    if fine:
        check_broken(broken, seen, DataConfig(max_broken=0.01))
        return
    with pytest.raises(DataError, match=f"{broken} of {seen} pictures cannot be read; mend the data"):
        check_broken(broken, seen, DataConfig(max_broken=0.01))


def test_fixed_crops_take_the_pictures_in_turn() -> None:
    source = RandomCrops(Drawn(9), replace(DataConfig(), flip=0.0), 16, 2)
    fixed = FixedCrops(source, 4, 3)
    assert len(fixed) == 12
    entries: list[Crop] = [fixed[entry] for entry in range(12)]
    assert all(torch.equal(entries[i].pixels, source.crop(i % 4, i).pixels) for i in range(12))
    assert not torch.equal(entries[0].pixels, entries[4].pixels)  # two crops of one picture

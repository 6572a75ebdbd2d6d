"""A backbone that needs no training, and small folders in ADE20K's and VOC2012's layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from radio.types import Features


class Patches:
    """Tokens are the colours of each patch and their squares; takes sides that are multiples of the patch."""

    token_dim = summary_dim = 6
    metadata = adaptors = MappingProxyType({})
    text = weights_file = window = with_window = intermediate = sam = None
    num_blocks, summary_tokens = 0, 1

    def __init__(self, patch: int = 14, only: tuple[int, int] | None = None) -> None:
        self.patch, self.only = patch, only
        self.native_size = only or (4 * patch, 4 * patch)
        self.patch_size, self.fixed_size = patch, only is not None
        self.name = f"patches{patch}"
        self.sizes: list[tuple[int, int]] = []  # of the images it was shown
        self.fail_after: int | None = None  # calls; stands for a kill

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        if self.only:
            return self.only
        return tuple(max(self.patch, round(side / self.patch) * self.patch) for side in (height, width))

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return self

    def eval(self) -> Self:
        return self

    def __call__(self, images: Tensor) -> Features:
        size = tuple(images.shape[-2:])
        assert self.nearest_size(*size) == size, f"shown {size}"
        assert not torch.is_inference(images)
        self.sizes += [size] * len(images)
        if self.fail_after is not None and len(self.sizes) > self.fail_after:
            raise KeyboardInterrupt
        plane = F.avg_pool2d(images.float(), self.patch)
        plane = torch.cat([plane, plane.square()], dim=1)
        return Features(plane.mean(dim=(2, 3)), plane.flatten(2).transpose(1, 2), tuple(plane.shape[2:]))


COLOURS = np.array([[230, 40, 40], [40, 220, 60], [50, 60, 230], [240, 230, 40]], dtype=np.uint8)


def scene(number: int, size: tuple[int, int], classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image [H, W, 3] of upright stripes in the colours of their classes, and labels 1, 2, ..."""
    generator = np.random.default_rng(number)
    height, width = size
    stripes = generator.integers(0, classes, 4)
    labels = np.tile(stripes[np.arange(width) * 4 // width], (height, 1)) + 1
    labels[: height // 8] = 0  # void
    image = COLOURS[labels - 1] + generator.normal(0, 25, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def write_pair(root: Path, split: str, number: int, size: tuple[int, int], classes: int = 3) -> None:
    pixels, labels = scene(number, size, classes)
    for kind, image, ending in (("images", pixels, "png"), ("annotations", labels, "png")):
        folder = root / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:04d}.{ending}")


@pytest.fixture
def patches() -> Callable[..., Patches]:
    """Makes backbones whose tokens are known."""
    return Patches


@pytest.fixture
def make_ade() -> Callable[..., Path]:
    """Writes a folder in ADE20K's layout with its own classes."""

    def make(
        root: Path,
        train: int = 8,
        val: int = 4,
        sizes: Sequence[tuple[int, int]] = ((40, 56), (56, 42)),
        classes: Sequence[str] = ("red", "green", "blue"),
    ) -> Path:
        for number in range(train + val):
            split = "training" if number < train else "validation"
            write_pair(root, split, number, sizes[number % len(sizes)], len(classes))
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        return root

    return make


@pytest.fixture
def make_voc() -> Callable[..., Path]:
    """Writes a folder in VOC2012's layout: palette annotations, 255 for void."""

    def make(root: Path, lists: dict[str, list[str]], augmented: Sequence[str] = ()) -> Path:
        for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name, keys in lists.items():
            (root / "ImageSets/Segmentation" / f"{name}.txt").write_text("".join(f"{k}\n" for k in keys))
            for number, key in enumerate(keys):
                pixels, labels = scene(number, (42, 56))
                Image.fromarray(pixels).save(root / "JPEGImages" / f"{key}.jpg", quality=95)
                image = Image.fromarray(np.where(labels == 0, 255, labels - 1).astype(np.uint8))
                image.putpalette([(7 * place) % 256 for place in range(768)])
                folder = "SegmentationClassAug" if key in augmented else "SegmentationClass"
                image.save(root / folder / f"{key}.png")
        return root

    return make

"""A backbone of coloured patches, and NYU's layout in small."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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
    """Tokens are each patch's colour and place; takes sides that are multiples of the patch."""

    token_dim = summary_dim = 5
    metadata = adaptors = MappingProxyType({})
    text = weights_file = window = with_window = intermediate = sam = None
    num_blocks, fixed_size = 0, False

    def __init__(self, patch: int = 16) -> None:
        self.patch_size, self.native_size, self.name = patch, (96, 96), f"patches{patch}"
        self.sizes: list[tuple[int, int]] = []  # of the images it was shown
        self.fail_after: int | None = None  # images; stands for a kill

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        height, width = (
            max(self.patch_size, round(side / self.patch_size) * self.patch_size) for side in (height, width)
        )
        return height, width

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return self

    def eval(self) -> Self:
        return self

    def __call__(self, images: Tensor) -> Features:
        height, width = images.shape[-2:]
        assert self.nearest_size(height, width) == (height, width)
        self.sizes += [(height, width)] * len(images)
        if self.fail_after is not None and len(self.sizes) > self.fail_after:
            raise KeyboardInterrupt
        plane = F.avg_pool2d(images.float(), self.patch_size)
        rows, columns = (torch.linspace(0, 1, side) for side in plane.shape[-2:])
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(images), -1, -1, -1)
        plane = torch.cat([plane, places], dim=1)
        return Features(plane.mean(dim=(2, 3)), plane.flatten(2).transpose(1, 2), plane.shape[-2:])


@pytest.fixture
def patches() -> Callable[..., Patches]:
    """Makes backbones."""
    return Patches


def write_nyu(root: Path, base: str = "") -> Path:
    """Write three training and two test images whose red falls with their depth, with the lists."""
    folders = {"train": f"{base or '.'}", "test": "official_splits/test" if base else "."}
    for split, count in (("train", 3), ("test", 2)):
        lines = []
        for number in range(count):
            draws = np.random.default_rng([number, count])
            depth = np.add.outer(np.linspace(1000, 5000, 480), np.linspace(0, 3000, 640)) + 100 * number
            image = np.stack(
                [255 - depth / 40, np.full(depth.shape, 90.0), draws.uniform(0, 255, depth.shape)]
            )
            depth[draws.random(depth.shape) < 0.1] = 0
            folder = root / folders[split] / f"bath_{split}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray(image.transpose(1, 2, 0).round().astype(np.uint8))
            pixels.save(folder / f"rgb_{number:05d}.jpg", quality=90)
            Image.fromarray(depth.astype(np.uint16)).save(folder / f"sync_depth_{number:05d}.png")
            slash = "/" if split == "train" else ""  # as in the shared lists
            names = (f"{slash}bath_{split}/{kind}_{number:05d}" for kind in ("rgb", "sync_depth"))
            lines.append(
                " ".join(f"{n}.{e}" for n, e in zip(names, ("jpg", "png"), strict=True)) + " 518.8579\n"
            )
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return root


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    """NYU in small."""
    return write_nyu(tmp_path / "nyu")

"""One thread for each worker, own caches, no network; image folders, and a small backbone."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from radio.types import Features

# Read when the libraries are imported, hence before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take what the libraries made while they were imported out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that no other test has filled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Pair:
    """An adaptor, as if a teacher's space held the summary's first two numbers."""

    def adapt_summary(self, summaries: Tensor) -> Tensor:
        return summaries[:, :2]


class Pooled:
    """A fixed random linear map of the image pooled to 4 x 4; takes sides that are multiples of 8."""

    native_size = (32, 32)
    token_dim = 3
    name = "pooled"
    patch_size, fixed_size = 8, False
    metadata = MappingProxyType({})
    text = weights_file = window = with_window = intermediate = sam = None
    num_blocks = summary_tokens = 0

    def __init__(self, width: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3 * 16, width, generator=generator)
        self.summary_dim = width
        self.calls = 0
        self.images = 0
        self.fail_after: int | None = None  # images; stands for a kill
        self.adaptors = {"pair": Pair()}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.weight.numpy().tobytes()).hexdigest()

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        self.weight = self.weight.to(device, dtype)
        return self

    def eval(self) -> Self:
        return self

    def __call__(self, images: Tensor) -> Features:
        from radio.types import Features  # not before HF_HUB_OFFLINE is set

        assert images.shape[-1] % 8 == 0
        assert images.shape[-2] % 8 == 0
        if self.fail_after is not None and self.images + len(images) > self.fail_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.images += len(images)
        pooled = F.adaptive_avg_pool2d(images, 4)
        tokens = pooled.flatten(2).transpose(1, 2)
        return Features((pooled.flatten(1) - 0.5) @ self.weight, tokens, (4, 4))


def image(label: int, number: int, side: int = 20) -> Image.Image:
    """A noisy image whose colour depends on its class."""
    generator = np.random.default_rng([label, number])
    base = np.array([40 + 90 * (label % 3), 40 + 60 * (label // 3), 120])
    pixels = base + generator.normal(0, 40, (side, side + label, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def backbone() -> Callable[..., Pooled]:
    """Makes backbones."""
    return Pooled


@pytest.fixture
def make_folder() -> Callable[..., Path]:
    """Writes an image folder with classes c0, c1, ..."""

    def make(root: Path, classes: int = 3, count: int = 6, first: int = 0) -> Path:
        for label in range(classes):
            folder = root / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(first, first + count):
                (folder / f"{number:03d}.png").write_bytes(encoded(image(label, number)))
        return root

    return make


@pytest.fixture
def make_shard() -> Callable[..., Path]:
    """Writes one tar file of (name, bytes)."""

    def make(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def png() -> Callable[[int, int], bytes]:
    """The bytes of a class's image."""
    return lambda label, number: encoded(image(label, number))


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

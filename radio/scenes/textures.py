"""Textures and noise: banks made once per process from a fixed seed; every image uses crops of them."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float32]

BASE_SIZE = 96  # side that the bank is made for; other sizes resize a crop, so that a scene looks the same
NUM_TEXTURES = 40
_TILE = 224  # side of a tile: a crop starts in the first _TILE - BASE_SIZE rows and columns
_BANK_SEED = 20240229
_NOISE_LENGTH = 1 << 21  # normals; a 1024 px plane is half of it


def crop(texture: int, u: float, v: float, size: int) -> Plane:
    """Crop one texture to [size, size], values in [0, 1]; u and v in [0, 1) choose where the crop starts."""
    room = _TILE - BASE_SIZE
    top, left = int(v * room), int(u * room)
    plane = _bank()[texture, top : top + BASE_SIZE, left : left + BASE_SIZE]
    if size == BASE_SIZE:
        return plane
    return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))


def noise(u: float, size: int) -> Plane:
    """Take a [size, size] plane of standard normal noise; u in [0, 1) chooses its start in the bank."""
    start = int(u * (_NOISE_LENGTH - size * size))
    return _normals()[start : start + size * size].reshape(size, size)


@lru_cache(maxsize=1)
def _normals() -> Plane:
    source = np.random.Generator(np.random.Philox(_BANK_SEED))
    normals: Plane = source.standard_normal(_NOISE_LENGTH, np.float32)
    normals.setflags(write=False)
    return normals


@lru_cache(maxsize=1)
def _bank() -> NDArray[np.float32]:
    """Make the bank [NUM_TEXTURES, _TILE, _TILE] in [0, 1]: clouds (2/5), stripes, checks and spots."""
    generator = np.random.Generator(np.random.Philox(_BANK_SEED + 1))
    makers = (_clouds, _clouds, _stripes, _checks, _spots)
    planes = [makers[i % len(makers)](generator) for i in range(NUM_TEXTURES)]
    bank = np.stack([_spread(plane) for plane in planes])
    bank.setflags(write=False)
    return bank


def _spread(plane: NDArray[np.float64]) -> Plane:
    low, high = np.quantile(plane, (0.01, 0.99))
    spread: Plane = np.clip((plane - low) / (high - low), 0, 1).astype(np.float32)
    return spread


def _clouds(generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw Gaussian noise with a 1/f^p spectrum: from fine grain (p = 0.6) to large clouds (p = 2.2)."""
    power = generator.uniform(0.6, 2.2)
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(generator.standard_normal((_TILE, _TILE))) / frequency**power
    spectrum[0, 0] = 0.0
    return np.fft.irfft2(spectrum, s=(_TILE, _TILE))


def _axes(generator: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw two rotated, slightly bent coordinates in pixels, [_TILE, _TILE] each."""
    angle = generator.uniform(0, np.pi)
    y, x = np.mgrid[0:_TILE, 0:_TILE].astype(np.float64)
    bend = generator.uniform(0, 4) * np.sin(y / generator.uniform(12, 40) + generator.uniform(0, 6))
    a = np.cos(angle) * x + np.sin(angle) * y + bend
    b = -np.sin(angle) * x + np.cos(angle) * y + bend
    return a, b


def _wave(x: NDArray[np.float64], period: float, sharpness: float) -> NDArray[np.float64]:
    return np.tanh(sharpness * np.sin(2 * np.pi * x / period))


def _stripes(generator: np.random.Generator) -> NDArray[np.float64]:
    a, _ = _axes(generator)
    return _wave(a, generator.uniform(5, 18), generator.uniform(0.8, 4))


def _checks(generator: np.random.Generator) -> NDArray[np.float64]:
    a, b = _axes(generator)
    period = generator.uniform(8, 22)
    return _wave(a, period, 3.0) * _wave(b, period * generator.uniform(0.8, 1.25), 3.0)


def _spots(generator: np.random.Generator) -> NDArray[np.float64]:
    a, b = _axes(generator)
    period = generator.uniform(7, 16)
    bumps = np.sin(2 * np.pi * a / period) + np.sin(2 * np.pi * b / period)
    return np.tanh(3 * (bumps - generator.uniform(0.2, 0.9)))

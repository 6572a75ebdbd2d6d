"""What a scene is drawn with: ten outlines inside the unit circle, textures and noise.

Outlines are polygons (x right, y down). Textures and noise are made once per process from a fixed seed; every
image uses crops of them.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]  # [P, 2]

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "moon",
    "arrow",
    "hourglass",
)

_OVERSAMPLE = 4  # sub-pixels per pixel side: 17 levels of coverage, and outlines placed between pixels


class Outline(NamedTuple):
    """A closed polygon and, for the ring, the polygon cut out of it."""

    rim: Points  # [P, 2]
    hole: Points | None


class Coverage(NamedTuple):
    """The share of each pixel that a shape covers, inside the shape's half-open box."""

    alpha: NDArray[np.float32]  # [h, w] in [0, 1]
    x0: int
    y0: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image that `alpha` covers."""
        height, width = self.alpha.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)


def _arc(radius: float, start: float, stop: float, num: int, cx: float = 0.0) -> Points:
    angle = np.linspace(math.radians(start), math.radians(stop), num)
    return np.stack([cx + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _star() -> Points:
    angle = -np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16.8


def _moon() -> Points:
    """Build a crescent open to the right: the unit disc without a smaller disc shifted to the right."""
    cut, shift = 0.78, 0.48
    x = (1 - cut**2 + shift**2) / (2 * shift)  # where the two circles meet
    outer = math.degrees(math.acos(x))
    inner = math.degrees(math.acos((x - shift) / cut))
    back = _arc(1.0, outer, 360 - outer, 48)
    front = _arc(cut, 360 - inner, inner, 32, cx=shift)
    return np.concatenate([back, front])


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.asarray(corners, dtype=np.float64)


def _cross() -> Points:
    a, b = 0.95, 0.3
    arm = ((-b, -a), (b, -a), (b, -b))  # the upper arm; the others are its quarter turns
    right = tuple((-y, x) for x, y in arm)
    return _polygon(*arm, *right, *((-x, -y) for x, y in arm), *((-x, -y) for x, y in right))


@lru_cache(maxsize=1)
def outlines() -> tuple[Outline, ...]:
    """Build one outline per shape, in the order of `SHAPES`."""
    circle = _arc(1.0, 0, 360 - 360 / 64, 64)
    side = 0.78
    rims: dict[str, Points] = {
        "circle": circle * 0.9,
        "square": _polygon((-side, -side), (side, -side), (side, side), (-side, side)),
        "triangle": _polygon((0, -1), (0.9, 0.72), (-0.9, 0.72)),
        "star": _star(),
        "cross": _cross(),
        "ring": circle * 0.95,
        "heart": _heart(),
        "moon": _moon(),
        "arrow": _polygon(
            (0, -1), (0.75, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.1), (-0.75, -0.1)
        ),
        "hourglass": _polygon((-0.75, -0.9), (0.75, -0.9), (0.14, 0), (0.75, 0.9), (-0.75, 0.9), (-0.14, 0)),
    }
    return tuple(Outline(rims[name], circle * 0.5 if name == "ring" else None) for name in SHAPES)


def cover(
    shape: int, *, centre: tuple[float, float], radius: float, angle: float, stretch: float, size: int
) -> Coverage:
    """Compute the anti-aliased coverage of one shape on a size x size image; empty if it is outside.

    Args:
        shape: index into `SHAPES`.
        centre: (x, y) in pixels, any fraction.
        radius: of the unit circle, in pixels.
        angle: radians, applied after the stretch.
        stretch: width factor; the height is divided by it.
        size: side of the image in pixels.
    """
    outline = outlines()[shape]
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    turn = np.array([[cos * stretch, sin * stretch], [-sin / stretch, cos / stretch]])
    rim = outline.rim @ turn + centre
    (left, top), (right, bottom) = rim.min(axis=0).tolist(), rim.max(axis=0).tolist()
    x0, y0 = max(0, math.floor(left)), max(0, math.floor(top))
    x1, y1 = min(size, math.ceil(right)), min(size, math.ceil(bottom))
    if x1 <= x0 or y1 <= y0:
        return Coverage(np.zeros((0, 0), np.float32), 0, 0)
    image = Image.new("L", ((x1 - x0) * _OVERSAMPLE, (y1 - y0) * _OVERSAMPLE))
    draw = ImageDraw.Draw(image)
    draw.polygon(_subpixels(rim, x0, y0), fill=255)
    if outline.hole is not None:
        draw.polygon(_subpixels(outline.hole @ turn + centre, x0, y0), fill=0)
    alpha = np.asarray(image.reduce(_OVERSAMPLE), dtype=np.float32)
    return Coverage(alpha * np.float32(1 / 255), x0, y0)


def _subpixels(points: Points, x0: int, y0: int) -> list[float]:
    """Convert corners to a flat list x, y, x, y … in sub-pixels.

    PIL truncates them to whole numbers and fills both ends, so every shape and its mask are shifted half a
    sub-pixel up and to the left.
    """
    flat: list[float] = ((points - (x0, y0)) * _OVERSAMPLE - 0.5).ravel().tolist()
    return flat


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


def sample(texture: int, u: float, v: float, points: Points) -> Plane:
    """Sample the texture of `crop` bilinearly at points [..., 2]: [...], values in [0, 1].

    Args:
        points: (x, y) in units of the crop's side, pixel centres at (column + 0.5) / size. Beyond the crop
            the texture goes on, and ends in the edge of its tile.
    """
    room = _TILE - BASE_SIZE
    last = _TILE - 1
    x, y = (
        np.clip(points[..., axis] * BASE_SIZE - 0.5 + int(start * room), 0, last)
        for axis, start in enumerate((u, v))
    )
    column, row = np.minimum(x.astype(np.int64), last - 1), np.minimum(y.astype(np.int64), last - 1)
    across, down = (x - column).astype(np.float32), (y - row).astype(np.float32)
    tile = _bank()[texture]
    upper = tile[row, column] * (1 - across) + tile[row, column + 1] * across
    lower = tile[row + 1, column] * (1 - across) + tile[row + 1, column + 1] * across
    sampled: Plane = upper * (1 - down) + lower * down
    return sampled


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

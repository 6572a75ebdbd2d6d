"""The layout of a scene: all random draws of an image, in units of its side, before rendering."""

import colorsys
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from .shapes import SHAPES
from .textures import NUM_TEXTURES

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
COLOURS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
CLASSES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

RGB = tuple[float, float, float]  # each in [0, 255]

_HUES = (354.0, 57.0, 122.0, 183.0, 226.0, 288.0)  # degrees, one per colour
_HUE_JITTER = 8.0
_DARKEST = (0.62, 0.80, 0.55, 0.68, 0.68, 0.62)  # value below which a person would name the hue differently
_MAX_TURN = math.radians(42)
_CANDIDATES = 4  # places tried for each small object before an overlap is accepted
_NUM_DRAWS = 192  # enough for four objects


class Texture(NamedTuple):
    """A texture of the bank, and the start of its crop (u, v in [0, 1))."""

    number: int
    u: float
    v: float


class Figure(NamedTuple):
    """One object before drawing; x, y and radius in units of the image's side."""

    shape: int
    colour: int
    x: float
    y: float
    radius: float
    angle: float
    stretch: float
    light: RGB
    dark: RGB
    texture: Texture


class Backdrop(NamedTuple):
    """Two colours mixed by a texture."""

    first: RGB
    second: RGB
    texture: Texture


class Camera(NamedTuple):
    """Effects on the whole image: a lighting field, a tint, blur (0: none) and noise."""

    slope: tuple[float, float]
    bow: tuple[float, float]
    tint: RGB  # factors around 1
    blur: float  # sd in pixels of a 96 px image
    noise: float  # sd in grey levels
    grain: tuple[float, float, float]  # start of each channel's noise in the bank


class Plan(NamedTuple):
    """A whole scene, independent of its size in pixels."""

    main: Figure
    above: tuple[Figure, ...]  # small ones meant to be in front of the main object, topmost first
    below: tuple[Figure, ...]  # and behind it, topmost first
    backdrop: Backdrop
    camera: Camera


def generator(index: int, *, split: Split, seed: int, stream: int) -> np.random.Generator:
    """Make one image's random generator: a Philox counter keyed by (seed, split), so streams never overlap.

    Streams: 0 the image, 1 the order of classes, 2 and up the language.
    """
    counter = np.array([0, stream, index, 0], dtype=np.uint64)
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=4096)
def _class_order(block: int, split: Split, seed: int) -> tuple[int, ...]:
    return tuple(generator(block, split=split, seed=seed, stream=1).permutation(len(CLASSES)).tolist())


def label_of(index: int, *, split: Split, seed: int) -> int:
    """Return the class of one image: each block of 60 indices holds every class once, in its own order."""
    block, place = divmod(index, len(CLASSES))
    return _class_order(block, split, seed)[place]


class _Draws:
    """Uniform numbers in a fixed order; one call to the generator fills them all."""

    def __init__(self, source: np.random.Generator) -> None:
        self._values: Iterator[float] = iter(source.random(_NUM_DRAWS).tolist())

    def unit(self) -> float:
        return next(self._values)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def below(self, count: int) -> int:
        return int(next(self._values) * count)


def layout_scene(index: int, *, split: Split, seed: int) -> Plan:
    """Draw everything random about one scene, in a fixed order."""
    draws = _Draws(generator(index, split=split, seed=seed, stream=0))
    label = label_of(index, split=split, seed=seed)
    backdrop = _backdrop(draws)
    camera = _camera(draws)
    radius = draws.between(0.20, 0.33)
    place = (draws.between(radius * 0.95, 1 - radius * 0.95), draws.between(radius * 0.95, 1 - radius * 0.95))
    main = _figure(draws, label, place, radius)
    placed = [main]
    above: list[Figure] = []
    below: list[Figure] = []
    for _ in range(draws.below(4)):
        other = _small(draws, label, placed)
        placed.append(other)
        (above if draws.unit() < 0.6 else below).append(other)
    return Plan(main, tuple(above), tuple(below), backdrop, camera)


def _small(draws: _Draws, label: int, placed: list[Figure]) -> Figure:
    """Draw a small object of another class than the main one's, with little overlap if possible."""
    other = (label + 1 + draws.below(len(CLASSES) - 1)) % len(CLASSES)
    radius = draws.between(0.09, 0.16)
    places = [
        (draws.between(radius * 0.8, 1 - radius * 0.8), draws.between(radius * 0.8, 1 - radius * 0.8))
        for _ in range(_CANDIDATES)
    ]
    free = (xy for xy in places if all(_apart(xy, radius, figure) for figure in placed))
    return _figure(draws, other, next(free, places[-1]), radius)


def _apart(xy: tuple[float, float], radius: float, figure: Figure) -> bool:
    return math.hypot(xy[0] - figure.x, xy[1] - figure.y) > 0.8 * (radius + figure.radius)


def _figure(draws: _Draws, label: int, place: tuple[float, float], radius: float) -> Figure:
    colour, shape = divmod(label, len(SHAPES))
    hue = _HUES[colour] + draws.between(-_HUE_JITTER, _HUE_JITTER)
    saturation = draws.between(0.68, 1.0)
    value = draws.between(_DARKEST[colour] + 0.12, 1.0)
    shade = draws.between(0.72, 1.0)
    pale = draws.between(0.6, 1.0)
    return Figure(
        shape=shape,
        colour=colour,
        x=place[0],
        y=place[1],
        radius=radius,
        angle=draws.between(-_MAX_TURN, _MAX_TURN),
        stretch=math.exp(draws.between(-0.16, 0.16)),
        light=_rgb(hue, saturation * pale, value),
        dark=_rgb(hue, saturation, max(value * shade, _DARKEST[colour])),
        texture=_texture(draws),
    )


def _backdrop(draws: _Draws) -> Backdrop:
    """Draw two muted colours of any hue, so that the image's mean colour is independent of the class."""
    first, second = (
        _rgb(draws.between(0, 360), draws.between(0.05, 0.45), draws.between(0.15, 0.85)) for _ in range(2)
    )
    mix = draws.between(0.35, 1.0)  # how far the texture swings from the first colour to the second
    second = (_mix(first[0], second[0], mix), _mix(first[1], second[1], mix), _mix(first[2], second[2], mix))
    return Backdrop(first, second, _texture(draws))


def _camera(draws: _Draws) -> Camera:
    return Camera(
        slope=(draws.between(-0.3, 0.3), draws.between(-0.3, 0.3)),
        bow=(draws.between(-0.25, 0.1), draws.between(-0.25, 0.1)),
        tint=(draws.between(0.94, 1.06), draws.between(0.94, 1.06), draws.between(0.94, 1.06)),
        blur=draws.between(0.5, 1.3) if draws.unit() < 0.25 else 0.0,
        noise=draws.between(4.0, 20.0),
        grain=(draws.unit(), draws.unit(), draws.unit()),
    )


def _texture(draws: _Draws) -> Texture:
    return Texture(draws.below(NUM_TEXTURES), draws.unit(), draws.unit())


def _mix(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return 255 * red, 255 * green, 255 * blue

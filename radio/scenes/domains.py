"""Domains of the generated world: the scenes as they are, in the dark, as web images, and a mixture."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import did_you_mean
from .drawing import noise
from .language import VOCABULARY
from .world import Scene, SceneError, Split, generator, render

Domain = Literal["own", "night", "web", "mixture"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

Pixels = NDArray[np.uint8]  # [3, H, W] RGB

_STREAM = 4  # of the generator; 0 to 3 draw the scene and its language
_MAX_INDEX = 1 << 62  # scenes from here on are the neighbours in collages, so no data set contains them
# Probabilities of what a web image went through, in the order in which it happens.
_COLLAGE, _GREY, _FRAME, _TEXT, _SHRINK, _JPEG = 0.1, 0.12, 0.2, 0.2, 0.25, 0.35


def render_domain(
    index: int, *, domain: str = "own", split: Split = "train", seed: int = 0, size: int = 96
) -> Pixels:
    """Draw scene number `index` as it looks in a domain: uint8 [3, size, size].

    The same arguments give the same image, and the label is that of the scene in every domain.

    - own: as `render` draws it; the shipped teachers were trained here, and the evaluators measure here;
    - night: in the dark, under one lamp, with a cold tint and a sensor's noise;
    - web: in a collage, grey, framed, under a bar of text, down-scaled or as a poor JPEG, each of them with
      its own probability;
    - mixture: the very image of `own` (a half of the indices), `night` or `web` (a quarter each).

    Raises:
        SceneError: an unknown domain, an index of 2^62 or more, or what `render` refuses.
    """
    if domain not in DOMAINS:
        hint = did_you_mean(domain, DOMAINS) or f"; it has {', '.join(DOMAINS)}"
        raise SceneError(f"the generated world has no domain {domain!r}{hint}")
    scene = render(index, split=split, seed=seed, size=size)
    if domain == "own":
        return scene.image
    if index >= _MAX_INDEX:
        raise SceneError(f"index {index} must be below 2^62 in the domain {domain}")
    draws = generator(index, split=split, seed=seed, stream=_STREAM)
    choice = draws.random()  # drawn in every domain, so that the mixture has the images of its parts
    if domain == "night" or (domain == "mixture" and 0.5 <= choice < 0.75):
        return _night(scene.image, draws)
    if domain == "mixture" and choice < 0.5:
        return scene.image
    image = scene.image
    if draws.random() < _COLLAGE:
        image = _collage(scene, render(index + _MAX_INDEX, split=split, seed=seed, size=size))
    return _web(image, draws)


def _night(image: Pixels, draws: np.random.Generator) -> Pixels:
    """Darken an image by a gamma, a factor and the distance from a lamp; tint it, and add noise."""
    size = image.shape[-1]
    gamma, factor = draws.uniform(1.2, 1.9), draws.uniform(0.5, 0.9)
    tint = (draws.uniform(0.7, 0.85), draws.uniform(0.85, 0.95), draws.uniform(1.0, 1.15))
    curve = 255 * factor * (np.arange(256) / 255) ** gamma
    places = (np.arange(size) + 0.5) / size
    across, down = (
        np.exp(-0.5 * ((places - draws.uniform(0.3, 0.7)) / draws.uniform(0.25, 0.5)) ** 2) for _ in range(2)
    )
    ambient = draws.uniform(0.15, 0.4)  # the share of the light that does not come from the lamp
    field = (ambient + (1 - ambient) * down[:, None] * across[None, :]).astype(np.float32)
    deviation = np.float32(draws.uniform(3, 9))
    dark = np.empty(image.shape, dtype=np.float32)
    for channel in range(3):
        np.take((curve * tint[channel]).astype(np.float32), image[channel], out=dark[channel])
        dark[channel] *= field
        dark[channel] += deviation * noise(draws.random(), size)
    np.rint(dark, out=dark)
    np.clip(dark, 0, 255, out=dark)
    return dark.astype(np.uint8)


def _collage(left: Scene, right: Scene) -> Pixels:
    """Place a strip of each of two scenes side by side, with its main object in the middle if possible."""
    size = left.image.shape[-1]
    strips = []
    for scene, width in ((left, size // 2), (right, size - size // 2)):
        x0, _, x1, _ = scene.objects[0].box
        start = min(max((x0 + x1 - width) // 2, 0), size - width)
        strips.append(scene.image[:, :, start : start + width])
    return np.concatenate(strips, axis=2)


def _web(pixels: Pixels, draws: np.random.Generator) -> Pixels:
    """Edit an image as people do before they upload it, then store it as a website does."""
    size = pixels.shape[-1]
    grey, frame, text, shrink, jpeg = (draws.random(5) < (_GREY, _FRAME, _TEXT, _SHRINK, _JPEG)).tolist()
    if not (grey or frame or text or shrink or jpeg):
        return pixels
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels])
    if grey:
        image = image.convert("L").convert("RGB")
    if frame:
        width = max(1, round(draws.uniform(0.03, 0.1) * size))
        framed = Image.new("RGB", image.size, _colour(draws))
        framed.paste(image.crop((width, width, size - width, size - width)), (width, width))
        image = framed
    if text:
        _write_bar(image, draws)
    if shrink:
        small = image.reduce(int(draws.integers(2, 4)))
        image = small.resize((size, size), Image.Resampling.BILINEAR)
    if jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(draws.integers(5, 41)))
        image = Image.open(file, formats=("JPEG",))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _write_bar(image: Image.Image, draws: np.random.Generator) -> None:
    """Cover a band of an image by a bar with random words of the captions on it."""
    size = image.width
    height = max(1, round(draws.uniform(0.12, 0.2) * size))
    words = " ".join(VOCABULARY[place] for place in draws.integers(len(VOCABULARY), size=4).tolist())
    colour = _colour(draws)
    ink = (0, 0, 0) if sum(colour) > 382 else (255, 255, 255)
    bar = Image.new("RGB", (11 * size // height, 11), colour)
    ImageDraw.Draw(bar).text((2, 0), words, fill=ink, font=_font())
    bar = bar.resize((size, height), Image.Resampling.BILINEAR)
    image.paste(bar, (0, int(draws.integers(size - height + 1))))


@lru_cache(maxsize=1)
def _font() -> ImageFont.ImageFont:
    """Load Pillow's bitmap font: letters of 11 px, the same on every machine."""
    return ImageFont.load_default_imagefont()


def _colour(draws: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = draws.integers(256, size=3).tolist()
    return red, green, blue

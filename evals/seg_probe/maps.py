"""Predicted label maps as palette PNGs, and overlays: picture, truth and prediction side by side."""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio.config import write_bytes

from .datasets import VOID, Labelling, Split
from .pixels import read_labels, read_picture

# Letters: H W a picture's own height and width, C classes.

Bytes = NDArray[np.uint8]

_OPACITY = 0.6
_GAP = 4  # white columns between the three


@final
@dataclass(frozen=True, slots=True)
class MapWriter:
    """Writes `NAME.png`, the labels as the data set numbers them, and `NAME-overlay.png`."""

    folder: Path
    split: Split
    labelling: Labelling
    places: frozenset[int]  # of the pictures that are kept

    def __call__(self, place: int, classes: Bytes) -> None:
        """Write the prediction [H, W] of a picture, if it is one that is kept."""
        if place not in self.places:
            return
        pair = self.split.pairs[place]
        colours = palette(len(self.labelling.classes))
        offset = int(self.labelling.zero_is_void)
        numbers = np.concatenate([np.zeros((offset, 3), np.uint8), colours])
        image = Image.fromarray(classes + np.uint8(offset))
        image.putpalette(numbers.tobytes())
        _save(image, self.folder / self.names(place)[0])
        picture = read_picture(pair).numpy().transpose(1, 2, 0)
        truth = read_labels(pair.labels, self.labelling)
        shown = side_by_side(picture, truth, classes, colours)
        _save(Image.fromarray(shown), self.folder / self.names(place)[1])

    def names(self, place: int) -> tuple[str, str]:
        """The files of a picture, inside the folder."""
        stem = self.split.pairs[place].key
        return f"{stem}.png", f"{stem}-overlay.png"

    def files(self) -> tuple[str, ...]:
        """All files, inside the folder's parent."""
        return tuple(
            f"{self.folder.name}/{name}" for place in sorted(self.places) for name in self.names(place)
        )


def palette(count: int) -> Bytes:
    """[C, 3]: colours that differ; neighbouring classes are far apart in hue (steps of the golden ratio)."""
    golden = (5**0.5 - 1) / 2
    rows = [
        colorsys.hsv_to_rgb(place * golden % 1, (1.0, 0.55, 0.8)[place % 3], (1.0, 0.9, 0.65)[place // 3 % 3])
        for place in range(count)
    ]
    return np.round(255 * np.array(rows)).astype(np.uint8)


def side_by_side(
    picture: Bytes,
    truth: Bytes,
    classes: Bytes,
    colours: Bytes,
) -> Bytes:
    """[H, 3 W + gaps, 3]: the picture [H, W, 3], truth and prediction [H, W] over it; void stays clear."""
    gap = np.full((picture.shape[0], _GAP, 3), 255, dtype=np.uint8)
    panels = [picture, gap, _over(picture, truth, colours), gap, _over(picture, classes, colours)]
    return np.concatenate(panels, axis=1)


def spread_places(count: int, wanted: int) -> frozenset[int]:
    """At most `wanted` places, evenly spread over `count`."""
    wanted = min(count, wanted)
    return frozenset(number * count // wanted for number in range(wanted))


def _over(picture: Bytes, classes: Bytes, colours: Bytes) -> Bytes:
    known = classes != VOID
    painted = colours[np.where(known, classes, 0)].astype(np.float32)
    mixed = np.where(known[..., None], _OPACITY * painted + (1 - _OPACITY) * picture, picture)
    return np.round(mixed).astype(np.uint8)


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())

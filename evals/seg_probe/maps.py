"""Predicted label maps as palette PNGs, and overlays: image, truth and prediction above a legend."""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from radio.images import write_png

from .data import VOID, Labelling, Split, read_image, read_labels

# Letters: H W an image's own height and width, C classes.

Bytes = NDArray[np.uint8]

_OPACITY, _UNSCORED = 0.6, 0.2  # of a colour over the image; of a prediction where the truth is void
_FEW = 24  # classes that hues alone distinguish
_LONGEST = 200  # bytes of a name; file systems take 255, with what is added
_GAP = 4  # white columns between the three images
_TEXT = 12  # pixels: the size of the legend's letters and squares


@final
@dataclass(frozen=True, slots=True)
class MapWriter:
    """Writes `NAME.png`, the labels as the data set numbers them, and `NAME-overlay.png`."""

    folder: Path
    split: Split
    labelling: Labelling
    indices: tuple[int, ...]  # of the images to write

    def __call__(self, index: int, classes: Bytes) -> None:
        """Write the prediction [H, W] of an image, if it is among `indices`."""
        if index not in self.indices:
            return
        pair = self.split.pairs[index]
        colours = palette(len(self.labelling.classes))
        offset = int(self.labelling.zero_is_void)
        numbers = np.concatenate([np.zeros((offset, 3), np.uint8), colours])
        image = Image.fromarray(classes + np.uint8(offset))
        image.putpalette(numbers.tobytes())
        write_png(image, self.folder / self.names(index)[0])
        pixels = read_image(pair).numpy().transpose(1, 2, 0)
        truth = read_labels(pair.labels, self.labelling)
        shown = side_by_side(pixels, truth, classes, colours)
        seen = np.union1d(truth[truth != VOID], classes)
        key = legend([(self.labelling.classes[n], colours[n]) for n in seen], shown.shape[1])
        shown = np.concatenate([shown, key])
        write_png(Image.fromarray(shown), self.folder / self.names(index)[1])

    def names(self, index: int) -> tuple[str, str]:
        """Return the two file names of an image in the folder."""
        stem = self.split.pairs[index].key
        if len(stem.encode()) > _LONGEST:
            stem = f"{stem[:40]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"
        return f"{stem}.png", f"{stem}-overlay.png"

    def files(self) -> tuple[str, ...]:
        """List all files, relative to the folder's parent."""
        return tuple(f"{self.folder.name}/{name}" for index in self.indices for name in self.names(index))


def palette(count: int) -> Bytes:
    """Choose distinct colours [C, 3]; neighbours in hue differ in brightness too."""
    golden = (5**0.5 - 1) / 2
    few = count <= _FEW
    hues = [index / count if few else index * golden % 1 for index in range(count)]
    levels = ((0.9, 1.0), (0.9, 0.55)) if few else ((0.9, 1.0), (0.9, 0.55), (0.5, 0.9))
    rows = [colorsys.hsv_to_rgb(hue, *levels[index % len(levels)]) for index, hue in enumerate(hues)]
    return np.round(255 * np.array(rows)).astype(np.uint8)


def side_by_side(image: Bytes, truth: Bytes, classes: Bytes, colours: Bytes) -> Bytes:
    """Draw the image [H, W, 3], and truth and prediction [H, W] over it: [H, 3 W + gaps, 3].

    Void is transparent in the truth; the prediction there, which is not scored, is faint.
    """
    gap = np.full((image.shape[0], _GAP, 3), 255, dtype=np.uint8)
    scored = truth != VOID
    shown_truth = _over(image, np.where(scored, truth, 0), colours, np.where(scored, _OPACITY, 0.0))
    shown = _over(image, classes, colours, np.where(scored, _OPACITY, _UNSCORED))
    return np.concatenate([image, gap, shown_truth, gap, shown], axis=1)


def legend(entries: Sequence[tuple[str, Bytes]], width: int) -> Bytes:
    """Draw the legend [h, width, 3]: on white, each name after a square of its colour, in lines that fit."""
    font = ImageFont.load_default(_TEXT)
    places, x, y = [], _TEXT // 2, _TEXT // 2
    for name, _ in entries:
        wide = 2 * _TEXT + math.ceil(font.getlength(name))
        if x + wide > width and x > _TEXT:
            x, y = _TEXT // 2, y + 3 * _TEXT // 2
        places.append((x, y))
        x += wide
    image = Image.new("RGB", (width, y + 3 * _TEXT // 2), "white")
    pen = ImageDraw.Draw(image)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        pen.rectangle((left, top, left + _TEXT, top + _TEXT), fill=tuple(colour.tolist()))
        pen.text((left + 5 * _TEXT // 4, top + _TEXT / 2), name, fill="black", font=font, anchor="lm")
    return np.array(image)


def _over(image: Bytes, classes: Bytes, colours: Bytes, opacity: NDArray[np.float64]) -> Bytes:
    share = opacity[..., None]
    return np.round(share * colours[classes] + (1 - share) * image).astype(np.uint8)

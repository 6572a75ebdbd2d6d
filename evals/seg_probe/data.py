"""Images with a class for every pixel: what their labels mean, and how they are checked and read."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from radio.chunks import Damage, DamagedError, read_records, write_records
from radio.errors import DataError, shown
from radio.images import MAX_IMAGE_BYTES, decode, open_image, orientation
from radio.io import read_bytes
from radio.progress import ProgressFactory, no_progress

from .protocol import Size

VOID = 255
"""Class of pixels that are ignored in training and scoring, after labels are mapped."""


Part = Literal["train", "val"]


class Pair(NamedTuple):
    """An image and its labels."""

    key: str
    image: Path
    labels: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The images of a training or validation split, in order."""

    name: str
    location: str
    pairs: tuple[Pair, ...]
    fingerprint: str = ""  # hash of the content, once it is checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelling:
    """The meaning of the numbers in annotation files."""

    classes: tuple[str, ...]
    zero_is_void: bool  # ADE20K: 0 is void and class i is written i + 1; else class i is written i
    background_is_void: bool = False  # whether pixels of the first class, the background, count as void

    @property
    def has_background(self) -> bool:
        """Whether the first class is the background."""
        return self.classes[0] == "background"

    @property
    def highest(self) -> int:
        """The largest label of a class."""
        return len(self.classes) - (not self.zero_is_void)

    def table(self) -> NDArray[np.uint8]:
        """Build the lookup table [256] from a label to the index of its class, or `VOID`."""
        table = np.full(256, VOID, dtype=np.uint8)
        first = int(self.zero_is_void)
        table[first : first + len(self.classes)] = np.arange(len(self.classes), dtype=np.uint8)
        if self.background_is_void:
            table[first] = VOID
        return table

    def to_json(self) -> str:
        """Encode as JSON, for hashes."""
        return json.dumps([self.classes, self.zero_is_void, *(["background"] * self.background_is_void)])

    def describe(self) -> str:
        """Describe the valid labels in words."""
        void = "0 and 255 for void" if self.zero_is_void else "255 for void"
        void += " as the background is" * self.background_is_void
        return f"{int(self.zero_is_void)} to {self.highest} for the {len(self.classes)} classes, {void}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Training and validation images under one labelling."""

    labelling: Labelling
    train: Split
    val: Split
    notes: tuple[str, ...] = ()


# Letters: H W stored height and width.

MAX_ASPECT = 256
"""An image longer than this times its width would be resized to less than a pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """The result of reading all files of a split."""

    fingerprint: str  # of names, classes and content
    sizes: tuple[Size, ...]  # all distinct ones
    rotated: int = 0  # images with an EXIF orientation, which is not applied


class _Inspected(NamedTuple):
    line: str  # for the fingerprint
    size: Size
    labelled: bool  # whether any pixel has a class
    rotated: bool


_CHECKED = TypeAdapter(Checked)
_IHDR, _DEPTH, _KIND, _GREY = slice(12, 16), 24, 25, 0  # positions in a PNG; and its colour type of grey


def read_image(pair: Pair) -> Tensor:
    """Read an image, uint8 [3, H, W] RGB.

    Raises:
        DataError: it is missing or cannot be decoded.
    """
    return _decode_image(pair.image, _bytes(pair.image))


def read_labels(path: Path, labelling: Labelling) -> NDArray[np.uint8]:
    """Read labels [H, W]: the class of every pixel as an index into `labelling.classes`, or `VOID`.

    The stored numbers are the labels: the values of a grey PNG, the indices of a palette PNG (VOC), whatever
    their colours; 16 bits are accepted where all values are labels.

    Raises:
        DataError: colours instead of numbers, a label without a class, or a file that cannot be read.
    """
    return _map_labels(path, _bytes(path), labelling)


def check_split(
    split: Split,
    labelling: Labelling,
    *,
    memo: Path,
    progress: ProgressFactory = no_progress,
    damage: Damage | None = None,
) -> Checked:
    """Validate every file of a split: images decode, annotations have their size and only known labels.

    The result is cached in `memo` until a file's size or modification time changes.

    Args:
        damage: records a damaged memo, which is then rebuilt.

    Raises:
        DataError: a pair is invalid (names the first and their number), or every pixel is void.
    """
    note = memo / f"seg-{_signature(split, labelling)}.jsonl"
    if note.exists():
        try:
            return read_records(note, _CHECKED)[0]
        except DamagedError as error:
            (damage or Damage()).add(error)
    good, faults = [], []
    with (
        progress(f"checking {split.name}", len(split.pairs)) as advance,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        for inspected in threads.map(lambda pair: _inspect(pair, labelling), split.pairs):
            advance(1)
            if isinstance(inspected, str):
                faults.append(inspected)
            else:
                good.append(inspected)
    if faults:
        more = f" ({len(faults)} of {len(split.pairs)} pairs are bad)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}")
    if not any(pair.labelled for pair in good):
        raise DataError(f"{split.name}: every pixel is void, so there is nothing to learn or to score")
    lines = "\n".join([labelling.to_json(), *(pair.line for pair in good)])
    checked = Checked(
        fingerprint=hashlib.sha256(lines.encode()).hexdigest(),
        sizes=tuple(sorted({pair.size for pair in good})),
        rotated=sum(pair.rotated for pair in good),
    )
    write_records(note, [asdict(checked)])
    return checked


def _inspect(pair: Pair, labelling: Labelling) -> _Inspected | str:
    """Inspect a pair; return its properties, or a message if it is invalid."""
    try:
        data, mask = _bytes(pair.image), _bytes(pair.labels)
        height, width = _decode_image(pair.image, data).shape[1:]
        labels = _map_labels(pair.labels, mask, labelling)
    except DataError as error:
        return str(error)
    turned = orientation(data)
    if labels.shape != (height, width):
        exif = f" (its EXIF orientation, {turned}, is not applied)" if turned > 1 else ""
        return (
            f"{shown(pair.labels)}: {labels.shape[0]}x{labels.shape[1]} (height x width), and its image is "
            f"{height}x{width}{exif}; an annotation has a label for every pixel"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        return (
            f"{shown(pair.image)}: {height}x{width} is over {MAX_ASPECT} times as long as wide; "
            f"crop or drop it"
        )
    hashes = (hashlib.sha256(content).hexdigest() for content in (data, mask))
    line = f"{pair.key} {' '.join(hashes)}"
    return _Inspected(line, (height, width), bool((labels != VOID).any()), turned > 1)


def _map_labels(path: Path, data: bytes, labelling: Labelling) -> NDArray[np.uint8]:
    try:
        with open_image(data, ("PNG",)) as file:
            mode, values = file.mode, _stored_values(file, data)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error
    if values.ndim != 2 or mode == "F":
        raise DataError(
            f"{shown(path)}: stores colours (mode {mode}); wanted the number of a class for each pixel, as a "
            f"grey or palette PNG"
        )
    foreign = [int(v) for v in np.unique(values) if v != VOID and not 0 <= v <= labelling.highest]
    if foreign:
        raise DataError(f"{shown(path)}: holds the label {foreign[0]}; wanted {labelling.describe()}")
    return labelling.table()[values.astype(np.uint8)]


def _stored_values(file: Image.Image, data: bytes) -> NDArray[np.generic]:
    """Return a PNG's pixels as stored; grey ones of 2 and 4 bits, which PIL scales to 8, are scaled back."""
    if data[_IHDR] != b"IHDR":
        raise DataError("a damaged PNG (it does not begin with IHDR)")
    values = np.asarray(file)
    if data[_KIND] == _GREY and data[_DEPTH] in (2, 4):
        values = values // (255 // (2 ** data[_DEPTH] - 1))
    return values


def _decode_image(path: Path, data: bytes) -> Tensor:
    try:
        return decode(data)
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error


def _bytes(path: Path) -> bytes:
    return read_bytes(path, limit=MAX_IMAGE_BYTES)


def _signature(split: Split, labelling: Labelling) -> str:
    sha = hashlib.sha256(labelling.to_json().encode())
    for pair in split.pairs:
        for path in (pair.image, pair.labels):
            try:
                stat = path.stat()
            except OSError as error:
                raise DataError(f"{shown(path)}: cannot be read ({error.strerror})") from error
            line = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n"
            sha.update(line.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()

"""Annotation files as arrays, and a check of every file before the first iteration."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evals.core.evaluator import Watch, silent
from radio.errors import DataError
from radio.images import decode
from radio.io import write_text

from .datasets import VOID, Labelling, Pair, Split
from .presets import Size

# Letters: H W stored height and width.

MAX_ASPECT = 256
"""A picture longer than this times its width would be resized to less than a pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A split whose files were all read once."""

    fingerprint: str  # of names, classes and content
    sizes: tuple[Size, ...]  # that occur


def read_picture(pair: Pair) -> Tensor:
    """The picture, uint8 [3, H, W] RGB.

    Raises:
        DataError: it is absent or cannot be decoded.
    """
    return _decode_picture(pair.picture, _bytes(pair.picture))


def read_labels(path: Path, labelling: Labelling) -> NDArray[np.uint8]:
    """[H, W], the class of every pixel as a place in `labelling.classes`, or `VOID`.

    The numbers stored are the labels: of a grey PNG its values, of a palette PNG (VOC) its indices, whatever
    their colours; 16 bits are taken where all values are labels.

    Raises:
        DataError: colours instead of numbers, a label of no class, or a file that cannot be read.
    """
    return _map_labels(path, _bytes(path), labelling)


def check_split(split: Split, labelling: Labelling, *, memo: Path, watch: Watch = silent) -> Checked:
    """Read every file of a split once: it decodes, fits its annotation, and has only labels that exist.

    The answer is kept in `memo` until a file's size or time changes.

    Raises:
        DataError: something is wrong; names the first bad file and how many there are.
    """
    note = memo / f"seg-{_signature(split, labelling)}.json"
    if note.is_file():
        kept = json.loads(note.read_text(encoding="utf-8"))
        return Checked(fingerprint=kept["fingerprint"], sizes=tuple((h, w) for h, w in kept["sizes"]))
    lines, sizes, labelled = [], set(), False
    faults: list[str] = []
    with (
        watch(f"checking {split.name}", len(split.pairs)) as advance,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        for found in threads.map(lambda pair: _inspect(pair, labelling), split.pairs):
            advance(1)
            if isinstance(found, str):
                faults.append(found)
                continue
            line, size, has_labels = found
            lines.append(line)
            sizes.add(size)
            labelled = labelled or has_labels
    if faults:
        more = f" ({len(faults)} of {len(split.pairs)} pairs are bad)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}")
    if not labelled:
        raise DataError(f"{split.name}: every pixel is void, so there is nothing to learn or to score")
    checked = Checked(fingerprint=_digest(labelling, lines), sizes=tuple(sorted(sizes)))
    write_text(note, json.dumps({"fingerprint": checked.fingerprint, "sizes": checked.sizes}))
    return checked


def _inspect(pair: Pair, labelling: Labelling) -> tuple[str, Size, bool] | str:
    """A line for the fingerprint, the size and whether any pixel has a class; or what is wrong."""
    try:
        data, mask = _bytes(pair.picture), _bytes(pair.labels)
        height, width = _decode_picture(pair.picture, data).shape[1:]
        labels = _map_labels(pair.labels, mask, labelling)
    except DataError as error:
        return str(error)
    if labels.shape != (height, width):
        return (
            f"{pair.labels}: {labels.shape[0]}x{labels.shape[1]} (height x width), and its picture is "
            f"{height}x{width}; an annotation has a label for every pixel"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        return f"{pair.picture}: {height}x{width} is over {MAX_ASPECT} times as long as wide; crop or drop it"
    hashes = (hashlib.sha256(content).hexdigest() for content in (data, mask))
    return f"{pair.key} {' '.join(hashes)}", (height, width), bool((labels != VOID).any())


def _map_labels(path: Path, data: bytes, labelling: Labelling) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as file:
            mode, values = file.mode, np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a picture, or a damaged one ({error})") from error
    if values.ndim != 2 or mode == "F":
        raise DataError(
            f"{path}: stores colours (mode {mode}); wanted the number of a class for each pixel, as a grey "
            f"or palette PNG"
        )
    table = labelling.table()
    used = np.unique(values)
    foreign = [int(v) for v in used if v != VOID and not 0 <= v <= labelling.highest]
    if foreign:
        raise DataError(f"{path}: holds the label {foreign[0]}; wanted {labelling.describe()}")
    mapped: NDArray[np.uint8] = table[values.astype(np.uint8)]
    return mapped


def _decode_picture(path: Path, data: bytes) -> Tensor:
    try:
        return decode(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _signature(split: Split, labelling: Labelling) -> str:
    sha = hashlib.sha256(json.dumps([labelling.classes, labelling.zero_is_void]).encode())
    for pair in split.pairs:
        for path in (pair.picture, pair.labels):
            stat = path.stat()
            sha.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def _digest(labelling: Labelling, lines: Sequence[str]) -> str:
    head = json.dumps([labelling.classes, labelling.zero_is_void])
    return hashlib.sha256("\n".join([head, *lines]).encode()).hexdigest()

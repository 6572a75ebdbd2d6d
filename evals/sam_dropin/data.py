"""COCO instances and detections with their images; masks as pycocotools decodes them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from radio.data import composed
from radio.errors import DataError, MissingDataError, require, shown
from radio.image_files import Entry, Listing, StoredImages, spread
from radio.images import MAX_IMAGE_BYTES, open_image
from radio.progress import ProgressFactory, no_progress

from .annotations import (
    CocoFile,
    CocoImage,
    Instance,
    check_apart,
    note_boxes,
    note_empty,
    read_instances,
    read_results,
)

# Letters: N instances of an image, H W pixels.

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_THREADS = 8  # for reading the images' headers
_HEAD = 1 << 16  # bytes that contain the header of nearly every image

LVIS_DETECTIONS = 300
"""Detections of an image that count in LVIS, of all categories together."""


@final
class Instances:
    """The images of a COCO instances file that have annotations to score.

    Args:
        images: in the order of the file, with the annotations to score.
        files: reads the images.
        file: the whole content of the instances file.
        name: for reports.
        notes: for reports, on how the images were read.
    """

    def __init__(
        self,
        images: tuple[CocoImage, ...],
        files: StoredImages,
        file: CocoFile,
        name: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.images, self.files, self.name, self.notes = images, files, name, notes
        self.categories, self.frequencies = file.categories, file.frequencies
        self.annotated: Mapping[int, CocoImage] = {image.id: image for image in file.images}
        self._digest = file.digest
        self._indices = {image.id: index for index, image in enumerate(images)}

    def read(self, image: CocoImage) -> Tensor:
        """Read an image's pixels, uint8 [3, H, W].

        Raises:
            DataError: it cannot be read, or its size differs from the one in the file.
        """
        try:
            pixels = self.files.read(self._indices[image.id])
        except DataError as error:
            raise DataError(f"{shown(image.name)}: {error}") from error
        height, width = pixels.shape[-2:]
        if (height, width) != image.size:
            raise DataError(_other_size(image, (height, width), self.name))
        return pixels

    @property
    def is_lvis(self) -> bool:
        """Whether each image names the categories that it was searched for."""
        return any(image.searched is not None for image in self.annotated.values())

    @property
    def count(self) -> int:
        """Number of scored annotations."""
        return sum(len(image.instances) for image in self.images)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the JSON, of the images' content, and of which annotations are scored."""
        chosen = [instance.id for image in self.images for instance in image.instances]
        text = f"{self._digest} {self.files.fingerprint} {chosen}"
        return hashlib.sha256(text.encode()).hexdigest()

    def masks(self, image: CocoImage) -> Tensor:
        """Decode the ground truth of an image's instances: bool [N, H, W]."""
        library = require("pycocotools.mask", extra="sam")
        encoded = [run_lengths(instance, image.size) for instance in image.instances]
        planes = library.decode(encoded)  # [H, W, N]
        return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1))).bool()


def run_lengths(instance: Instance, size: tuple[int, int]) -> dict[str, Any]:
    """Convert an annotation on an image of (H, W) to pycocotools' compressed run lengths."""
    library, segmentation = require("pycocotools.mask", extra="sam"), instance.segmentation
    lengths: dict[str, Any] = segmentation
    if isinstance(segmentation, list):
        lengths = library.merge(library.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        lengths = library.frPyObjects(segmentation, *size)
    return lengths


@final
@dataclass(frozen=True, slots=True)
class Detections:
    """A detector's boxes on the images of an instances file."""

    truth: Instances  # images without annotations included
    images: tuple[CocoImage, ...]  # those with boxes that count; an instance's id is its index in the file
    scores: tuple[float, ...]  # of every entry of the file
    fingerprint: str  # hash of the boxes and of the ground truth
    name: str
    notes: tuple[str, ...]


def open_detections(file: Path, truth: Instances) -> Detections:
    """Read a detector's boxes: COCO results, a list of {image_id, category_id, bbox, score}.

    Images of LVIS keep those that can count: of the 300 best by score (of equal scores the first of the
    file), the ones of a category that the image was searched for.

    Raises:
        DataError: not a results file, no detections (that count), or one of an unknown image or category.
    """
    rows, digest = read_results(file)
    boxes: dict[int, list[Instance]] = {image.id: [] for image in truth.images}
    for row in rows:
        if row.image_id not in truth.annotated or row.instance.category not in truth.categories:
            raise DataError(
                f"{shown(file)}: entry {row.instance.id} is of image {row.image_id} and category "
                f"{row.instance.category}, and {truth.name} does not have both"
            )
        if row.image_id in boxes:  # not excluded by the limit
            boxes[row.image_id].append(row.instance)
    count = sum(map(len, boxes.values()))
    if not count:
        raise DataError(f"{file}: holds no detections on the images of {truth.name}")
    scores = tuple(row.score for row in rows)
    for image in truth.images:
        if image.searched is not None:
            best = sorted(boxes[image.id], key=lambda each: -scores[each.id])[:LVIS_DETECTIONS]
            kept = {each.id for each in best if each.category in image.searched}
            boxes[image.id] = [each for each in boxes[image.id] if each.id in kept]
    images = tuple(
        image._replace(instances=tuple(boxes[image.id])) for image in truth.images if boxes[image.id]
    )
    if not images:
        raise DataError(
            f"{shown(file)}: none of its {count} detections on the images of {truth.name} is of a category "
            f"that its image was searched for"
        )
    notes, key = note_boxes(images, "detections"), f"{digest} {truth.fingerprint}"
    if left_out := count - sum(map(len, boxes.values())):
        note = (
            f"{left_out} of {count} detections cannot count by LVIS's rule and are left out: beyond the "
            f"{LVIS_DETECTIONS} best of their image, or of a category that it was not searched for"
        )
        notes = (note, *notes)
        key += f" without {left_out}"
    return Detections(
        truth=truth,
        images=images,
        scores=scores,
        fingerprint=hashlib.sha256(key.encode()).hexdigest(),
        name=f"{file.name} on {truth.name}",
        notes=notes,
    )


def open_instances(
    file: Path,
    folder: Path,
    *,
    limit: int | None,
    crowds: bool,
    smallest_area: float,
    memo: Path | None,
    empty: bool = False,
    name: str | None = None,
    location: str | None = None,
    watch: ProgressFactory = no_progress,
) -> Instances:
    """Open the images of an instances JSON that have annotations to score; validate everything first.

    Args:
        limit: maximum number of images, evenly spaced.
        crowds: whether to score crowd annotations.
        smallest_area: annotations with a smaller area are not scored.
        memo: a folder that caches content hashes of unchanged files.
        empty: include images without annotations.
        name: for reports (default: the file's).
        location: of the images, for reports (default: the folder).
        watch: shows the progress of the hashing.

    Raises:
        DataError: not an instances file, images that are not in the folder, cannot be read or are of
            another size, or nothing to score.
        MissingExtraError: pycocotools is not installed.
    """
    data = read_instances(file)
    chosen = []
    for image in data.images:
        scored = (i for i in image.instances if i.area >= smallest_area and (crowds or not i.crowd))
        chosen.append(image._replace(instances=tuple(scored)))
    if not any(image.instances for image in chosen):
        raise DataError(f"{shown(file)}: none of its {len(chosen)} images has an annotation to score")
    kept = spread([image for image in chosen if image.instances or empty], limit)
    paths = _find_all(kept, folder, file)
    notes = _check_images(kept, paths, name or file.stem)
    entries = [
        Entry(image.name, "", path, 0, path.stat().st_size) for image, path in zip(kept, paths, strict=True)
    ]
    listing = Listing(file.stem, location or str(folder.resolve()), ("",), tuple(entries))
    files = StoredImages(listing, memo, watch)
    notes = (*notes, *note_boxes(kept, "boxes"), *note_empty(kept), *files.notes)
    return Instances(kept, files, data, name or file.stem, notes)


def _find_all(images: Sequence[CocoImage], root: Path, file: Path) -> list[Path]:
    """Find the file of each image; raise DataError when one is missing or belongs to two images."""
    if not root.is_dir():
        raise MissingDataError(
            f"{shown(root)}: no such folder; give the one that holds the images of {file.name}"
        )
    listings: dict[Path, dict[str, list[str]]] = {}
    paths = [_find(root, image.name, listings) for image in images]
    absent = [shown(image.name[:200]) for image, path in zip(images, paths, strict=True) if path is None]
    if absent:
        listed = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        raise MissingDataError(
            f"{shown(root)}: {len(absent)} of the {len(images)} images of {shown(file.name)} are not "
            f"there: {listed}"
        )
    existing = [path for path in paths if path is not None]
    check_apart(file, [(image.id, str(path)) for image, path in zip(images, existing, strict=True)])
    return existing


def _find(root: Path, name: str, listings: dict[Path, dict[str, list[str]]]) -> Path | None:
    """Find the file `name`, else the only one equal to it in NFC; accents may be composed or decomposed."""
    try:
        if (root / name).is_file():
            return root / name
        path = root
        for part in PurePosixPath(name).parts:
            if not (path / part).exists():
                if path not in listings:
                    listings[path] = {}
                    for entry in path.iterdir():
                        listings[path].setdefault(_form(entry.name), []).append(entry.name)
                alike = listings[path].get(_form(part), [])
                if len(alike) != 1:
                    return None
                part = alike[0]
            path = path / part
        return path if path.is_file() else None
    except OSError:  # a name that the system does not accept
        return None


def _form(name: str) -> str:
    """Normalise a name to NFC; bytes that are not UTF-8 become U+FFFD, as in JSON."""
    return composed(re.sub("[\ud800-\udfff]", "\ufffd", name))


def _check_images(images: Sequence[CocoImage], paths: Sequence[Path], name: str) -> tuple[str, ...]:
    """Check the images' headers; return notes on them.

    Raises:
        DataError: a file that is not an image, or has another size than in the file `name`.
    """
    faults, turned = [], 0
    with ThreadPoolExecutor(_THREADS) as threads:
        for image, header in zip(images, threads.map(_read_header, paths), strict=True):
            if isinstance(header, str):
                faults.append(f"{shown(image.name)}: {header}")
                continue
            size, rotated = header
            turned += rotated
            if size != image.size:
                faults.append(_other_size(image, size, name))
    verb = "has" if turned == 1 else "have"
    note = f"{turned} of {len(images)} images {verb} an EXIF orientation that is not applied"
    if faults:
        why = f"; {note}: write it into the pixels" if turned else ""
        more = f" ({len(faults)} of {len(images)} images are bad)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}{why}")
    return (f"{note}; are the annotations made on the pixels as they are stored?",) if turned else ()


def _other_size(image: CocoImage, size: tuple[int, int], name: str) -> str:
    return f"{shown(image.name)} is {list(size)} (height, width), and {shown(name)} says {list(image.size)}"


def _read_header(path: Path) -> tuple[tuple[int, int], bool] | str:
    """Read the stored (H, W) of an image, and whether an EXIF orientation differs; or say what is wrong."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            try:
                return _parse_header(head)
            except DataError:  # headers may be longer, mostly due to metadata before them
                return _parse_header(head + file.read(MAX_IMAGE_BYTES))
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _parse_header(data: bytes) -> tuple[tuple[int, int], bool]:
    with open_image(data) as image:
        # For a PNG without EXIF, PIL would search behind the pixels.
        exif = image.getexif() if "exif" in image.info else {}
        return (image.height, image.width), exif.get(_ORIENTATION, 1) in range(2, 9)

"""COCO instances: a checked JSON and a folder of images, and the masks that pycocotools makes of it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from evals.core.stored import Entry, Listing, StoredImages
from radio.errors import DataError, require, shown
from radio.images import MAX_IMAGE_BYTES, open_image

from .annotations import CocoFile, Instance, Picture, check_apart, note_boxes, note_empty, read_instances

# Letters: N instances of an image, H W pixels.

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_THREADS = 8  # that read the images' headers
_HEAD = 1 << 16  # bytes that hold the header of nearly every image


@final
class Instances:
    """The images of a COCO instances file that have something to score.

    Args:
        pictures: in the order of the file, with the annotations to score.
        images: reads them.
        file: all that the instances file says.
        name: for reports.
        notes: for reports, on how the images were taken.
    """

    def __init__(
        self,
        pictures: tuple[Picture, ...],
        images: StoredImages,
        file: CocoFile,
        name: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.pictures, self.images, self.name, self.notes = pictures, images, name, notes
        self.categories = file.categories
        self.annotated: Mapping[int, Picture] = {picture.number: picture for picture in file.pictures}
        self._digest = file.digest
        self._places = {picture.number: place for place, picture in enumerate(pictures)}

    @property
    def content(self) -> str:
        """A hash of the pictures' bytes."""
        return self.images.fingerprint

    def read(self, picture: Picture) -> Tensor:
        """The pixels, uint8 [3, H, W].

        Raises:
            DataError: it cannot be read, or is of another size than the file says.
        """
        try:
            image = self.images.read(self._places[picture.number])
        except DataError as error:
            raise DataError(f"{shown(picture.name)}: {error}") from error
        height, width = image.shape[-2:]
        if (height, width) != picture.size:
            raise DataError(_other_size(picture, (height, width), self.name))
        return image

    @property
    def count(self) -> int:
        """How many annotations are scored."""
        return sum(len(picture.instances) for picture in self.pictures)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the JSON, of the pictures' content, and of which annotations are scored."""
        chosen = [instance.number for picture in self.pictures for instance in picture.instances]
        text = f"{self._digest} {self.images.fingerprint} {chosen}"
        return hashlib.sha256(text.encode()).hexdigest()

    def masks(self, picture: Picture) -> Tensor:
        """The ground truth of a picture's instances: bool [N, H, W]."""
        library = require("pycocotools.mask", extra="sam")
        encoded = [run_lengths(instance, picture.size) for instance in picture.instances]
        planes = library.decode(encoded)  # [H, W, N]
        return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1))).bool()


def run_lengths(instance: Instance, size: tuple[int, int]) -> dict[str, Any]:
    """An annotation on an image of (H, W) as pycocotools' compressed run lengths."""
    library, segmentation = require("pycocotools.mask", extra="sam"), instance.segmentation
    if isinstance(segmentation, list):
        found: dict[str, Any] = library.merge(library.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        found = library.frPyObjects(segmentation, *size)
    else:
        found = segmentation
    return found


def open_instances(
    file: Path,
    images: Path,
    *,
    limit: int | None,
    crowds: bool,
    smallest_area: float,
    memo: Path | None,
    empty: bool = False,
    name: str | None = None,
    location: str | None = None,
) -> Instances:
    """The pictures of an instances JSON that have annotations to score; all is checked before any work.

    Args:
        limit: take so many of them, spread evenly.
        crowds: whether crowd annotations count.
        smallest_area: annotations below it do not count.
        memo: a folder that keeps content hashes of unchanged files.
        empty: keep pictures without annotations too.
        name: for reports; the file's unless given.
        location: where the pictures lie, for reports; the folder unless given.

    Raises:
        DataError: not such a file, pictures that are not in the folder, cannot be read or are of another
            size, or nothing to score.
        MissingExtraError: pycocotools is not installed.
    """
    data = read_instances(file)
    pictures = [
        picture._replace(
            instances=tuple(
                one for one in picture.instances if one.area >= smallest_area and (crowds or not one.crowd)
            )
        )
        for picture in data.pictures
    ]
    kept = [picture for picture in pictures if picture.instances or empty]
    if not any(picture.instances for picture in kept):
        raise DataError(f"{shown(file)}: none of its {len(pictures)} pictures has an annotation to score")
    if limit is not None and limit < len(kept):
        kept = [kept[place * len(kept) // limit] for place in range(limit)]
    paths = _find_all(kept, images, file)
    notes = _check_images(kept, paths, name or file.stem)
    entries = [
        Entry(picture.name, "", path, 0, path.stat().st_size)
        for picture, path in zip(kept, paths, strict=True)
    ]
    listing = Listing(file.stem, location or str(images.resolve()), ("",), tuple(entries))
    notes = (*notes, *note_boxes(kept, "boxes"), *note_empty(kept))
    return Instances(tuple(kept), StoredImages(listing, memo), data, name or file.stem, notes)


def _find_all(pictures: Sequence[Picture], root: Path, file: Path) -> list[Path]:
    """The file of each picture."""
    if not root.is_dir():
        raise DataError(f"{shown(root)}: no such folder; give the one that holds the images of {file.name}")
    listings: dict[Path, dict[str, list[str]]] = {}
    found = [_find(root, picture.name, listings) for picture in pictures]
    absent = [
        shown(picture.name[:200]) for picture, path in zip(pictures, found, strict=True) if path is None
    ]
    if absent:
        listed = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        raise DataError(
            f"{shown(root)}: {len(absent)} of the {len(pictures)} pictures of {shown(file.name)} are not "
            f"there: {listed}"
        )
    paths = [path for path in found if path is not None]
    check_apart(file, [(picture.number, str(path)) for picture, path in zip(pictures, paths, strict=True)])
    return paths


def _find(root: Path, name: str, listings: dict[Path, dict[str, list[str]]]) -> Path | None:
    """The file `name`, else the only one that reads like it: accents composed (NFC) or decomposed (NFD)."""
    try:
        if (root / name).is_file():
            return root / name
        path = root
        for part in PurePosixPath(name).parts:
            if not (path / part).exists():
                if path not in listings:
                    listings[path] = _list_forms(path)
                alike = listings[path].get(_form(part), [])
                if len(alike) != 1:
                    return None
                part = alike[0]
            path = path / part
        return path if path.is_file() else None
    except OSError:  # a name that the system does not take
        return None


def _list_forms(folder: Path) -> dict[str, list[str]]:
    """The names in a folder by their one form."""
    found: dict[str, list[str]] = {}
    for path in folder.iterdir():
        found.setdefault(_form(path.name), []).append(path.name)
    return found


def _form(name: str) -> str:
    """One form of names that read alike; bytes that are no UTF-8 are U+FFFD, as JSON has them."""
    return unicodedata.normalize("NFC", re.sub("[\ud800-\udfff]", "\ufffd", name))


class _Header(NamedTuple):
    size: tuple[int, int]  # (H, W) as stored
    turned: bool  # whether an EXIF orientation asks for another


def _check_images(pictures: Sequence[Picture], paths: Sequence[Path], name: str) -> tuple[str, ...]:
    """Notes on the images' headers.

    Raises:
        DataError: an image that is none, or of another size than the file `name` says.
    """
    faults, turned = [], 0
    with ThreadPoolExecutor(_THREADS) as threads:
        for picture, header in zip(pictures, threads.map(_read_header, paths), strict=True):
            if isinstance(header, str):
                faults.append(f"{shown(picture.name)}: {header}")
                continue
            turned += header.turned
            if header.size != picture.size:
                faults.append(_other_size(picture, header.size, name))
    verb = "has" if turned == 1 else "have"
    note = f"{turned} of {len(pictures)} images {verb} an EXIF orientation that is not applied"
    if faults:
        why = f"; {note}: write it into the pixels" if turned else ""
        more = f" ({len(faults)} of {len(pictures)} images are bad)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}{why}")
    return (f"{note}; are the annotations made on the pixels as they are stored?",) if turned else ()


def _other_size(picture: Picture, size: tuple[int, int], name: str) -> str:
    return (
        f"{shown(picture.name)} is {list(size)} (height, width), and {shown(name)} says {list(picture.size)}"
    )


def _read_header(path: Path) -> _Header | str:
    """Size and orientation of a stored image, or why it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            try:
                return _parse_header(head)
            except DataError:  # headers may be longer, the metadata before them above all
                return _parse_header(head + file.read(MAX_IMAGE_BYTES))
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _parse_header(data: bytes) -> _Header:
    with open_image(data) as image:
        # Where a PNG has none, PIL would look behind the pixels.
        exif = image.getexif() if "exif" in image.info else {}
        return _Header((image.height, image.width), exif.get(_ORIENTATION, 1) in range(2, 9))

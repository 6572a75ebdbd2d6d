"""COCO instances: a JSON and a folder of pictures, read through pycocotools and checked before any work."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from evals.core.stored import Entry, Listing, StoredImages
from radio.errors import DataError, require

# Letters: N instances of a picture, H W pixels.


class Instance(NamedTuple):
    """One annotation."""

    number: int  # its id
    category: int  # id
    box: tuple[float, float, float, float]  # x0 y0 x1 y1 in pixels, half-open
    area: float
    crowd: bool


class Picture(NamedTuple):
    """One picture and what is annotated on it."""

    number: int  # its id
    name: str
    size: tuple[int, int]  # (H, W)
    instances: tuple[Instance, ...]


@final
class Instances:
    """The pictures of a COCO instances file that have something to score.

    Args:
        pictures: in the order of the file.
        images: reads them.
        coco: pycocotools' index of the whole file.
        name: for reports.
        digest: of the JSON file.
    """

    def __init__(
        self, pictures: tuple[Picture, ...], images: StoredImages, coco: Any, name: str, digest: str
    ) -> None:
        self.pictures, self.images, self.coco, self.name, self._digest = pictures, images, coco, name, digest
        self._places = {picture.number: place for place, picture in enumerate(pictures)}

    @cached_property
    def categories(self) -> dict[int, str]:
        """Names by id, in the order of the file."""
        return {int(category["id"]): str(category["name"]) for category in self.coco.dataset["categories"]}

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
            raise DataError(f"{picture.name}: {error}") from error
        if tuple(image.shape[-2:]) != picture.size:
            raise DataError(
                f"{picture.name} is {list(image.shape[-2:])} (height, width), and {self.name} says "
                f"{list(picture.size)}"
            )
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
        encoded = [self.coco.annToRLE(self.coco.anns[instance.number]) for instance in picture.instances]
        planes = library.decode(encoded)  # [H, W, N]
        return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1))).bool()


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
    """The pictures of an instances JSON that have annotations to score.

    Args:
        limit: take so many of them, spread evenly.
        crowds: whether crowd annotations count.
        smallest_area: annotations below it do not count.
        memo: a folder that keeps content hashes of unchanged files.
        empty: keep pictures without annotations too.
        name: for reports; the file's unless given.
        location: where the pictures lie, for reports; the folder unless given.

    Raises:
        DataError: not such a file, pictures that are not in the folder, or nothing to score.
        MissingExtraError: pycocotools is not installed.
    """
    data, digest = _read(file)
    coco = _index(data, file)
    try:
        pictures = [
            _picture(image, coco.imgToAnns.get(image["id"], []), crowds, smallest_area)
            for image in data["images"]
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"{file}: not COCO instances ({type(error).__name__}: {error}); wanted images with id, "
            f"file_name, height and width, and annotations with id, image_id, category_id, bbox, area and "
            f"segmentation"
        ) from error
    kept = [picture for picture in pictures if picture.instances or empty]
    if not any(picture.instances for picture in kept):
        raise DataError(f"{file}: none of its {len(pictures)} pictures has an annotation to score")
    if limit is not None and limit < len(kept):
        kept = [kept[place * len(kept) // limit] for place in range(limit)]
    stored = _images(kept, images, file, location, memo)
    return Instances(tuple(kept), stored, coco, name or file.stem, digest)


def _read(file: Path) -> tuple[dict[str, Any], str]:
    if not file.is_file():
        raise DataError(f"{file}: no such instances file")
    raw = file.read_bytes()
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in lists):
        raise DataError(f"{file}: not COCO instances; wanted an object with {', '.join(lists)}")
    return data, hashlib.sha256(raw).hexdigest()


def _index(data: dict[str, Any], file: Path) -> Any:
    library = require("pycocotools.coco", extra="sam")
    coco = library.COCO()
    coco.dataset = data
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco.createIndex()
    except (TypeError, KeyError) as error:
        raise DataError(f"{file}: not COCO instances ({type(error).__name__}: {error})") from error
    return coco


def _picture(image: Any, annotations: Sequence[Any], crowds: bool, smallest_area: float) -> Picture:
    size = int(image["height"]), int(image["width"])
    found = [_instance(annotation, size) for annotation in annotations]
    kept = [one for one in found if one.area >= smallest_area and (crowds or not one.crowd)]
    return Picture(int(image["id"]), str(image["file_name"]), size, tuple(kept))


def _instance(annotation: Any, size: tuple[int, int]) -> Instance:
    x, y, width, height = (float(value) for value in annotation["bbox"])
    problem = _problem(annotation["segmentation"], size)
    if problem:
        raise ValueError(f"the segmentation of annotation {annotation['id']} {problem}")
    return Instance(
        number=int(annotation["id"]),
        category=int(annotation["category_id"]),
        box=(x, y, x + width, y + height),
        area=float(annotation["area"]),
        crowd=bool(annotation.get("iscrowd", 0)),
    )


def _problem(segmentation: Any, size: tuple[int, int]) -> str:
    """What is wrong with a segmentation of a picture of (H, W); pycocotools would draw nonsense or stop."""
    match segmentation:
        case [_, *_]:
            odd = [part for part in segmentation if not _is_polygon(part)]
            return "has a polygon that is not three or more points x y" if odd else ""
        case {"size": [height, width], "counts": str() | list() as counts}:
            if (height, width) != size:
                return f"is of {height}x{width} px, and its picture of {size[0]}x{size[1]}"
            if isinstance(counts, list) and sum(counts) != height * width:
                return f"has run lengths of {sum(counts)} pixels, and its picture has {height * width}"
            return ""
    return "is neither polygons nor run lengths with size and counts"


def _is_polygon(part: Any) -> bool:
    return (
        isinstance(part, list)
        and len(part) >= 6
        and len(part) % 2 == 0
        and all(isinstance(value, int | float) for value in part)
    )


def _images(
    pictures: Sequence[Picture], root: Path, file: Path, location: str | None, memo: Path | None
) -> StoredImages:
    absent = [picture.name for picture in pictures if not (root / picture.name).is_file()]
    if absent:
        listed = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        raise DataError(
            f"{root}: {len(absent)} of the {len(pictures)} pictures of {file.name} are not there: {listed}"
        )
    entries = [
        Entry(picture.name, "", root / picture.name, 0, (root / picture.name).stat().st_size)
        for picture in pictures
    ]
    return StoredImages(Listing(file.stem, location or str(root.resolve()), ("",), tuple(entries)), memo)

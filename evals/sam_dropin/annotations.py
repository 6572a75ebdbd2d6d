"""Read and validate files of COCO and LVIS: instances and detections, checked as a whole before any work.

pycocotools does not validate its input: a polygon far outside its image crashes the interpreter, run lengths
that do not add up are read from uninitialised memory, an annotation that shares its id is scored against
another's mask. So it only receives what has passed these checks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, NotRequired

import numpy as np
from annotated_types import Interval, Len
from pydantic import AllowInfNan, BeforeValidator, TypeAdapter
from typing_extensions import TypedDict

from radio.errors import DataError, MissingExtraError, require, shown
from radio.images import MAX_PIXELS
from radio.io import MAX_DATA_BYTES, brief, decode_text, parse_json, read_bytes, validate
from radio.scenes.export import decompress

# Letters: N instances of an image, H W pixels, P points of a polygon.

_MAX_SIDE = 65_535  # of a JPEG, pixels
_MAX_AREA = 1e10  # the upper end of COCOeval's ranges
_REACH = 100_000.0  # pixels: the largest distance of a coordinate from an image's corner
_MAX_PERIMETER = 4_000_000.0  # pixels: pycocotools rasterises all of them, at five times the resolution
_SLACK = 2  # pixels that a box may reach beyond its image without a note
_MAX_MASKS = 16 << 30  # bytes of an image's masks, one per pixel


class Instance(NamedTuple):
    """An annotation or a detection."""

    id: int  # a detection's index in its file
    category: int  # id
    box: tuple[float, float, float, float]  # x0 y0 x1 y1 in pixels, half-open
    area: float
    crowd: bool
    segmentation: Any = None  # polygons, or run lengths with size and counts; None for a detection


class CocoImage(NamedTuple):
    """An image and its annotations."""

    id: int
    name: str
    size: tuple[int, int]  # (H, W)
    instances: tuple[Instance, ...]
    searched: frozenset[int] | None = None  # LVIS: the categories it was searched for; None = all
    not_exhaustive: frozenset[int] = frozenset()  # LVIS: those of which not every object is annotated


class CocoFile(NamedTuple):
    """The content of an instances file."""

    images: tuple[CocoImage, ...]  # with all their annotations, in the order of the file
    categories: dict[int, str]  # names by id, in the order of the file
    digest: str  # of its bytes
    frequencies: Mapping[int, Any]  # LVIS: r (rare), c (common) or f (frequent), by category


class Detection(NamedTuple):
    """An entry of a results file."""

    image_id: int
    score: float
    instance: Instance


def _whole(value: Any) -> Any:
    """Convert 7.0 to 7, as JSON does not distinguish them; raise ValueError for a string."""
    if isinstance(value, str):
        raise ValueError("wanted a number, and this is a text; write it without quotes")
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Id = Annotated[int, Interval(ge=-(2**63), lt=2**63), BeforeValidator(_whole)]
_Side = Annotated[int, Interval(ge=1, le=_MAX_SIDE), BeforeValidator(_whole)]
_Flag = Annotated[int, Interval(ge=0, le=1), BeforeValidator(_whole)]
_Number = Annotated[float, AllowInfNan(False)]
_Coordinate = Annotated[float, Interval(ge=-_REACH, le=_REACH)]
_Box = Annotated[list[_Coordinate], Len(4, 4)]


def _named(value: Any) -> Any:
    """Add LVIS's missing file_name: the end of coco_url, such as val2017/000000000001.jpg."""
    if isinstance(value, dict) and "file_name" not in value and isinstance(value.get("coco_url"), str):
        return {**value, "file_name": "/".join(value["coco_url"].split("/")[-2:])}
    return value


class _Image(TypedDict):
    id: _Id
    file_name: Annotated[str, Len(1, 4096)]
    height: _Side
    width: _Side
    neg_category_ids: NotRequired[list[_Id]]
    not_exhaustive_category_ids: NotRequired[list[_Id]]


class _Annotation(TypedDict):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: _Box
    area: Annotated[float, Interval(ge=0, le=_MAX_AREA)]
    segmentation: Any
    iscrowd: NotRequired[_Flag]


class _Category(TypedDict):
    id: _Id
    name: str | int
    frequency: NotRequired[Any]


class _Instances(TypedDict):
    images: list[Annotated[_Image, BeforeValidator(_named)]]
    annotations: list[_Annotation]
    categories: list[_Category]


class _Entry(TypedDict):
    image_id: _Id
    category_id: _Id
    bbox: _Box
    score: _Number


_INSTANCES = TypeAdapter(_Instances)
_RESULTS = TypeAdapter(list[_Entry])


def read_instances(file: Path) -> CocoFile:
    """Read and validate an instances file of COCO or LVIS.

    Raises:
        DataError: not COCO instances; repeated ids, an image or category that is not listed, a box,
            area, polygon or run length out of bounds. Names the first such record and their number.
        MissingExtraError: pycocotools is not installed, and a segmentation has empty runs, which it merges.
    """
    raw = read_bytes(file, limit=MAX_DATA_BYTES)
    where = f"{shown(file)}: not COCO instances"
    data = validate(_INSTANCES, parse_json(decode_text(raw, file), file), where)
    _check_unique(file, "image", "images", [image["id"] for image in data["images"]])
    _check_unique(file, "annotation", "annotations", [each["id"] for each in data["annotations"]])
    _check_unique(file, "category", "categories", [category["id"] for category in data["categories"]])
    check_apart(file, [(image["id"], str(PurePosixPath(image["file_name"]))) for image in data["images"]])
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    faults = [
        f"image {id} has {height}x{width} = {height * width} px, and the limit is {MAX_PIXELS}; cut it"
        for id, (height, width) in sizes.items()
        if height * width > MAX_PIXELS
    ]
    _refuse(file, "images", len(sizes), faults)
    categories = {category["id"]: str(category["name"]) for category in data["categories"]}
    searched = _searched(file, data)
    instances: dict[int, list[Instance]] = {id: [] for id in sizes}
    for annotation in data["annotations"]:
        try:
            instance = _make_instance(annotation, sizes, categories)
            instances[annotation["image_id"]].append(instance)
        except MissingExtraError:
            raise
        except ValueError as error:
            faults.append(f"annotation {annotation['id']} {error}")
    _refuse(file, "annotations", len(data["annotations"]), faults)
    for id, (height, width) in sizes.items():
        count = len(instances[id])
        if count * height * width > _MAX_MASKS:
            faults.append(
                f"the masks of the {count} annotations of image {id}, {height}x{width} px, take "
                f"{count * height * width >> 30} GiB, and the limit is {_MAX_MASKS >> 30}; cut the image"
            )
    _refuse(file, "images", len(sizes), faults)
    images = tuple(
        CocoImage(
            id=image["id"],
            name=image["file_name"],
            size=sizes[image["id"]],
            instances=tuple(instances[image["id"]]),
            searched=searched.get(image["id"]),
            not_exhaustive=frozenset(image.get("not_exhaustive_category_ids", ())),
        )
        for image in data["images"]
    )
    marks = {each["id"]: each["frequency"] for each in data["categories"] if "frequency" in each}
    digest = hashlib.sha256(raw).hexdigest()
    return CocoFile(images, categories, digest, marks if searched else {})


def _searched(file: Path, data: _Instances) -> dict[int, frozenset[int]]:
    """Return the categories that each image of a file of LVIS was searched for; empty for other files."""
    images = data["images"]
    absent = {image["id"]: image["neg_category_ids"] for image in images if "neg_category_ids" in image}
    if absent and len(absent) < len(images):
        raise DataError(
            f"{shown(file)}: {len(absent)} of {len(images)} images have neg_category_ids; in LVIS all have, "
            f"in COCO none"
        )
    listed = {category["id"] for category in data["categories"]}
    faults = [
        f"image {id} has neg_category_ids {min(set(ids) - listed)}, which the file does not list"
        for id, ids in absent.items()
        if not listed.issuperset(ids)
    ]
    _refuse(file, "images", len(images), faults)
    searched = {id: set(ids) for id, ids in absent.items()}
    for annotation in data["annotations"] if searched else ():
        if annotation["image_id"] in searched:
            searched[annotation["image_id"]].add(annotation["category_id"])
    return {id: frozenset(ids) for id, ids in searched.items()}


def read_results(file: Path) -> tuple[list[Detection], str]:
    """Read a detector's boxes (COCO results): all entries in order, and a hash of the file's bytes.

    Raises:
        DataError: not COCO results, or a box or score out of bounds; names the first entry.
    """
    raw = read_bytes(file, limit=MAX_DATA_BYTES)
    where = f"{shown(file)}: not COCO results, a list of objects with image_id, category_id, bbox and score"
    entries = validate(_RESULTS, parse_json(decode_text(raw, file), file), where)
    detections, faults = [], []
    for index, entry in enumerate(entries):
        try:
            box, area = _corners(entry["bbox"]), entry["bbox"][2] * entry["bbox"][3]
            instance = Instance(index, entry["category_id"], box, area, False)
            detections.append(Detection(entry["image_id"], entry["score"], instance))
        except ValueError as error:
            faults.append(f"entry {index} {error}")
    _refuse(file, "entries", len(entries), faults)
    return detections, hashlib.sha256(raw).hexdigest()


def note_boxes(images: Sequence[CocoImage], what: str) -> tuple[str, ...]:
    """Note which boxes seem to follow another convention: corners instead of a size, or relative coordinates.

    Args:
        what: name of the boxes in the note.
    """
    boxes = [(*instance.box, *image.size) for image in images for instance in image.instances]
    some, every = f"of {len(boxes)} {what}", f"all {len(boxes)} {what}"
    beyond = sum(x1 > w + _SLACK or y1 > h + _SLACK for _, _, x1, y1, h, w in boxes)
    flat = sum(x0 == x1 or y0 == y1 for x0, y0, x1, y1, _, _ in boxes)
    outside = sum(x0 >= w or y0 >= h or x1 < 0 or y1 < 0 for x0, y0, x1, y1, h, w in boxes)
    highest = max((max(box[:4]) for box in boxes), default=0.0)
    notes = {
        f"{beyond} {some} reach more than {_SLACK} px beyond their image; COCO's are x, y, width and height, "
        f"not two corners": beyond,
        f"{flat} {some} have no width or no height": flat,
        f"{outside} {some} lie wholly outside their image": outside,
        f"{every} lie within the first pixel; COCO's are in pixels, not shares of a side": 0 < highest <= 1,
    }
    return tuple(note for note, applies in notes.items() if applies)


def note_empty(images: Sequence[CocoImage]) -> tuple[str, ...]:
    """Note how many masks have no pixel inside their image: each of them scores 0 for any prediction."""
    instances = [(instance, image) for image in images for instance in image.instances]
    empty = [instance.id for instance, image in instances if _is_empty(instance.segmentation, image.size)]
    if not empty:
        return ()
    count = f"{len(empty)} of {len(instances)} annotations have no pixel inside their image"
    return (f"{count} and score 0 whatever is drawn; the first is annotation {empty[0]}",)


def _is_empty(segmentation: Any, size: tuple[int, int]) -> bool:
    if isinstance(segmentation, list):
        return all(
            max(part[::2]) <= 0
            or max(part[1::2]) <= 0
            or min(part[::2]) >= size[1]
            or min(part[1::2]) >= size[0]
            for part in segmentation
        )
    counts = segmentation["counts"]
    return not any((decompress(counts) if isinstance(counts, str) else counts)[1::2])


def check_apart(file: Path, names: Iterable[tuple[int, str]]) -> None:
    """Check that the images (id, name) of a file have distinct names: one under two ids would count twice.

    Raises:
        DataError: two ids share a name; names both.
    """
    first: dict[str, int] = {}
    for id, name in names:
        if first.setdefault(name, id) != id:
            raise DataError(
                f"{shown(file)}: images {first[name]} and {id} are one file, {shown(name[:200])}; list "
                f"it once, with the annotations of both"
            )


def _check_unique(file: Path, kind: str, plural: str, ids: Sequence[int]) -> None:
    repeated = {id: times for id, times in Counter(ids).items() if times > 1}
    if repeated:
        first, times = next(iter(repeated.items()))
        raise DataError(
            f"{shown(file)}: {kind} id {first} stands {times} times ({sum(repeated.values())} of {len(ids)} "
            f"{plural} share an id); give each its own"
        )


def _refuse(file: Path, plural: str, total: int, faults: Sequence[str]) -> None:
    if faults:
        raise DataError(f"{shown(file)}: {faults[0]} ({len(faults)} of {total} {plural})")


def _make_instance(
    annotation: _Annotation, sizes: Mapping[int, tuple[int, int]], categories: Mapping[int, str]
) -> Instance:
    """Convert an annotation; raise ValueError if it is invalid."""
    if annotation["image_id"] not in sizes:
        raise ValueError(f"is of image {annotation['image_id']}, which the file does not list")
    if annotation["category_id"] not in categories:
        raise ValueError(f"is of category {annotation['category_id']}, which the file does not list")
    return Instance(
        id=annotation["id"],
        category=annotation["category_id"],
        box=_corners(annotation["bbox"]),
        area=annotation["area"],
        crowd=bool(annotation.get("iscrowd", 0)),
        segmentation=_segmentation(annotation["segmentation"], sizes[annotation["image_id"]]),
    )


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    if width < 0 or height < 0:
        raise ValueError(f"has a box {width:g} wide and {height:g} high; wanted x, y, width, height")
    return x, y, x + width, y + height


def _segmentation(value: Any, size: tuple[int, int]) -> Any:
    """Return a segmentation of an image of (H, W) as pycocotools takes it; raise ValueError if invalid."""
    match value:
        case [_, *_]:
            for part in value:
                _check_polygon(part)
            return value
        case {"size": [height, width], "counts": str() | list() as counts}:
            if not _are_numbers((height, width), (int, float)):
                raise ValueError(
                    f"has a segmentation of size [{brief(height)}, {brief(width)}]; wanted two numbers"
                )
            if (height, width) != size:
                raise ValueError(
                    f"has a segmentation of {height}x{width} px, and its image has {size[0]}x{size[1]}"
                )
            return {"size": list(size), "counts": _counts(counts, size)}
    raise ValueError("has a segmentation that is neither polygons nor run lengths with size and counts")


def _check_polygon(part: Any) -> None:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2 or not _are_numbers(part, (int, float)):
        raise ValueError("has a polygon that is not three or more points x y")
    lowest, highest = min(part), max(part)
    if not -_REACH <= lowest <= highest <= _REACH:
        raise ValueError(f"has a polygon with a point that lies more than {_REACH:.0f} px from its image")
    if len(part) * (highest - lowest) <= 2 * _MAX_PERIMETER:  # no edge is longer than that difference
        return
    points = np.asarray(part, dtype=np.float64).reshape(-1, 2)  # [P, 2]
    around = float(np.abs(points - points[np.arange(-1, len(points) - 1)]).max(axis=1).sum())
    if around > _MAX_PERIMETER:
        raise ValueError(f"has a polygon {around:.0f} px around, and the limit is {_MAX_PERIMETER:.0f}")


def _counts(counts: str | list[Any], size: tuple[int, int]) -> str | list[Any]:
    """Validate run lengths: integers, none negative, that add up to the image; raise ValueError otherwise.

    Runs separated by an empty one are merged: pycocotools' overlap computation stops early at some of those.
    """
    if isinstance(counts, list) and not _are_numbers(counts, (int,)):
        raise ValueError("has run lengths that are not all whole numbers")
    try:
        lengths = decompress(counts) if isinstance(counts, str) else counts
    except ValueError as error:
        raise ValueError(f"has run lengths that {error}") from error
    lowest = min(lengths, default=0)
    if lowest < 0:
        raise ValueError(f"has a run length of {lowest}; none can be negative")
    if sum(lengths) != size[0] * size[1]:
        raise ValueError(f"has run lengths of {sum(lengths)} pixels, and its image has {size[0] * size[1]}")
    if 0 not in lengths[1:]:
        return counts
    mask = np.repeat(np.arange(len(lengths), dtype=np.uint8) % 2, lengths).reshape(size, order="F")
    merged: str = require("pycocotools.mask", extra="sam").encode(mask)["counts"].decode("ascii")
    return merged


def _are_numbers(values: Sequence[Any], kinds: tuple[type, ...]) -> bool:
    return set(map(type, values)) <= set(kinds)  # isinstance would accept bool as int

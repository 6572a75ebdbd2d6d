"""Pairs of images with the same points in both: SPair-71k as it is published, and the generated world's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from radio.data import ImageSource, SceneViews
from radio.errors import DataError, MissingDataError, shown
from radio.image_files import Entry, Listing, StoredImages, as_text, spread
from radio.io import read_json
from radio.progress import ProgressFactory, no_progress
from radio.scenes import SHAPES, move_points

# Letters: K points.

_POINTS = 16  # on an object of the generated world
_TURNS = (28.0, 56.0)  # degrees between two views from which on their difference is 1 and 2 (ours)
_BLOCK = 64  # pairs of the generated world whose tokens are in memory at once


class Pair(NamedTuple):
    """Two images of an object, and the same points in both."""

    id: str
    category: str
    parts: tuple[
        str, ...
    ]  # in which it counts: "" for all pairs of a class, "_view1" for a difference of view
    images: tuple[int, int]  # indices into the source
    points: NDArray[np.float64]  # [K, 2, 2]: in both images, (x, y), in units of the squares' sides
    reach: float  # the longer side of the object's box in the second, in the same units


class Pairs(NamedTuple):
    """Images, and pairs of them in blocks whose tokens are in memory together."""

    images: ImageSource  # squares
    blocks: tuple[tuple[Pair, ...], ...]


class _Annotation(TypedDict):
    src_imname: str
    trg_imname: str
    src_imsize: Annotated[list[int], Field(min_length=2)]  # width, height, channels
    trg_imsize: Annotated[list[int], Field(min_length=2)]
    trg_bndbox: Annotated[list[float], Field(min_length=4, max_length=4)]  # left, top, right, bottom
    category: str
    src_kps: list[tuple[float, float]]
    trg_kps: list[tuple[float, float]]
    viewpoint_variation: Annotated[int, Field(ge=0, le=2)]


_ANNOTATION = TypeAdapter(_Annotation)


class _Read(NamedTuple):
    """A pair as its file has it."""

    id: str
    category: str
    view: int
    keys: tuple[str, str]  # of the images, below JPEGImages/
    sizes: tuple[tuple[int, int], tuple[int, int]]  # width, height
    points: NDArray[np.float64]  # as in `Pair`
    reach: float


@final
class _Squares:
    """Images that are completed to squares, white on the right and below, when they are read."""

    def __init__(self, images: StoredImages, sizes: Sequence[tuple[int, int]]) -> None:
        self._images, self._sizes = images, sizes
        self.name, self.location = images.name, images.location
        self.classes, self.labels, self.notes = images.classes, images.labels, images.notes
        self.keys = images.keys

    @property
    def fingerprint(self) -> str:
        """Hash of the images."""
        return self._images.fingerprint

    def read(self, index: int) -> Tensor:
        """Read an image, uint8 [3, S, S]."""
        image, (width, height) = self._images.read(index), self._sizes[index]
        if image.shape[1:] != (height, width):
            raise DataError(
                f"has {image.shape[2]}x{image.shape[1]} pixels, and its annotations say {width}x{height}"
            )
        square = torch.full((3, max(height, width), max(height, width)), 255, dtype=torch.uint8)
        square[:, :height, :width] = image
        return square


def open_spair(
    folder: Path, *, pairs_per_class: int | None, memo: Path | None, watch: ProgressFactory = no_progress
) -> Pairs:
    """Open the test pairs of SPair-71k.

    Args:
        folder: has PairAnnotation/test/*.json and JPEGImages/CLASS/*.jpg.
        pairs_per_class: at most so many of each class, and of each class and difference of view; None = all.
        memo: a folder that caches content hashes of unchanged files.

    Raises:
        DataError: an annotation that is none, or contradicts another.
        MissingDataError: no annotations, or an image that they name is absent.
    """
    files = sorted((folder / "PairAnnotation" / "test").glob("*.json"))
    if not files:
        raise MissingDataError(
            f"{shown(folder)}: has no PairAnnotation/test/*.json; wanted the folder of SPair-71k"
        )
    by_class: dict[str, list[_Read]] = {}
    with watch("reading SPair-71k", len(files)) as advance:
        for path in files:
            each = _read(path)
            by_class.setdefault(each.category, []).append(each)
            advance(1)
    sizes: dict[str, tuple[int, int]] = {}
    blocks = []
    for category in sorted(by_class):
        chosen = _choose(by_class[category], pairs_per_class)
        for each, _ in chosen:
            for key, size in zip(each.keys, each.sizes, strict=True):
                if sizes.setdefault(key, size) != size:
                    raise DataError(f"{shown(folder)}: two sizes of the image {key}, one in {each.id}.json")
        blocks.append(chosen)
    images = StoredImages(_list_images(folder, list(sizes)), memo, watch)
    places = {key: place for place, key in enumerate(sizes)}
    return Pairs(
        _Squares(images, list(sizes.values())),
        tuple(
            tuple(
                Pair(
                    id=as_text(each.id),
                    category=each.category,
                    parts=parts,
                    images=(places[each.keys[0]], places[each.keys[1]]),
                    points=each.points,
                    reach=each.reach,
                )
                for each, parts in block
            )
            for block in blocks
        ),
    )


def _choose(pairs: Sequence[_Read], most: int | None) -> list[tuple[_Read, tuple[str, ...]]]:
    """Choose pairs of a class, and of each difference of view; return them with the parts they count in."""
    parts: dict[int, tuple[str, ...]] = {}
    for view in (None, 0, 1, 2):
        numbers = [number for number, pair in enumerate(pairs) if view in (None, pair.view)]
        for number in spread(numbers, most):
            parts[number] = (*parts.get(number, ()), "" if view is None else f"_view{view}")
    return [(pairs[number], parts[number]) for number in sorted(parts)]


def make_scenes(count: int, *, seed: int) -> Pairs:
    """Make pairs of views in the generated world, with points over what both show of the main object."""
    images = SceneViews([(index, view) for index in range(count) for view in (0, 1)], seed=seed)
    pairs = [_scene_pair(images, index) for index in range(count)]
    return Pairs(images, tuple(tuple(pairs[start : start + _BLOCK]) for start in range(0, count, _BLOCK)))


def _scene_pair(images: SceneViews, index: int) -> Pair:
    first, second = (images.draw(2 * index + view) for view in (0, 1))
    (main, *_), instances = second.scene.objects, second.scene.instances
    size = len(instances)
    rows, columns = np.nonzero(first.scene.instances == 1)
    source = (np.stack([columns, rows], axis=1) + 0.5) / size
    target = move_points(source, first.pose, second.pose)
    x, y = np.floor(target * size).astype(int).T
    inside = np.flatnonzero(((target >= 0) & (target < 1)).all(axis=1))
    seen = inside[instances[y[inside], x[inside]] == 1]
    left, top, right, bottom = main.box
    turn = abs(math.degrees(second.pose.angle - first.pose.angle))
    difference = sum(turn >= least for least in _TURNS)
    return Pair(
        id=images.keys[2 * index],
        category=SHAPES[main.shape],
        parts=("", f"_view{difference}"),
        images=(2 * index, 2 * index + 1),
        points=np.stack([source, target], axis=1)[list(spread(seen.tolist(), _POINTS))],
        reach=max(right - left, bottom - top) / size,
    )


def _read(path: Path) -> _Read:
    annotation = read_json(path, _ANNOTATION, strict=False)
    left, top, right, bottom = annotation["trg_bndbox"]
    points = (annotation["src_kps"], annotation["trg_kps"])
    sizes = (annotation["src_imsize"], annotation["trg_imsize"])
    if len(points[0]) != len(points[1]) or not points[0]:
        raise DataError(
            f"{shown(path)}: has {len(points[0])} points in src_kps and {len(points[1])} in trg_kps"
        )
    if not (right > left and bottom > top):
        raise DataError(f"{shown(path)}: the box {annotation['trg_bndbox']} in trg_bndbox is empty")
    if min(*sizes[0], *sizes[1]) < 1:
        raise DataError(f"{shown(path)}: an image has no pixels by src_imsize or trg_imsize")
    category, sides = annotation["category"], [max(size[:2]) for size in sizes]
    return _Read(
        id=path.stem,
        category=category,
        view=annotation["viewpoint_variation"],
        keys=(f"{category}/{annotation['src_imname']}", f"{category}/{annotation['trg_imname']}"),
        sizes=((sizes[0][0], sizes[0][1]), (sizes[1][0], sizes[1][1])),
        points=np.stack([np.array(each) / side for each, side in zip(points, sides, strict=True)], axis=1),
        reach=max(right - left, bottom - top) / sides[1],
    )


def _list_images(folder: Path, names: Sequence[str]) -> Listing:
    paths = [folder / "JPEGImages" / name for name in names]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise MissingDataError(
            f"{shown(absent[0])}: no such image ({len(absent):,} of {len(paths):,} are absent); unpack the "
            f"whole of them"
        )
    entries = [
        Entry(as_text(name), "", path, 0, path.stat().st_size)
        for name, path in zip(names, paths, strict=True)
    ]
    return Listing("SPair-71k", as_text(folder.resolve()), ("",), tuple(entries))

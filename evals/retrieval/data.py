"""ROxford5k and RParis6k as they are published, and the generated world's twin of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated, NamedTuple, final

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from radio.data import ImageSource, SceneViews
from radio.errors import DataError, MissingDataError, shown
from radio.image_files import Entry, Listing, StoredImages, as_text
from radio.io import MAX_DATA_BYTES, read_json
from radio.progress import ProgressFactory, no_progress

# Letters: Q queries, N images of the database, M judgements.

EASY, HARD, JUNK = 1, 2, 3

Protocols = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The grades that are positive and those that are left out, by the suffix of a protocol's metrics."""

PROTOCOLS: Protocols = {
    "_medium": ((EASY, HARD), (JUNK,)),
    "_hard": ((HARD,), (EASY, JUNK)),
    "_easy": ((EASY,), (HARD, JUNK)),
}
_CONVERT = (
    "python -c \"import json, pickle; json.dump(pickle.load(open('{0}.pkl', 'rb')), open('{0}.json', 'w'), "
    'default=lambda array: array.tolist())"'
)


class Benchmark(NamedTuple):
    """Queries, the images among which the same objects are looked for, and which these are."""

    queries: ImageSource
    database: ImageSource
    judged: Tensor  # [M, 3] int64: query, image, grade; all other images show other objects
    protocols: Protocols  # the first is the primary one

    def grades(self, queries: Tensor) -> Tensor:
        """Return the grades of all images for some queries: [Q] -> [Q, N] uint8, 0 for other objects."""
        grades = torch.zeros(len(queries), len(self.database.keys), dtype=torch.uint8)
        row = torch.full((len(self.queries.keys),), -1)
        row[queries] = torch.arange(len(queries))
        judged = self.judged[row[self.judged[:, 0]] >= 0]
        grades[row[judged[:, 0]], judged[:, 1]] = judged[:, 2].to(torch.uint8)
        return grades


_Name = Annotated[str, Field(min_length=1)]
_Ids = list[Annotated[int, Field(ge=0)]]


class _Truth(TypedDict):
    bbx: Annotated[list[float], Field(min_length=4, max_length=4)]  # left, top, right, bottom
    easy: _Ids
    hard: _Ids
    junk: _Ids


class _File(TypedDict):
    imlist: Annotated[list[_Name], Field(min_length=1)]
    qimlist: Annotated[list[_Name], Field(min_length=1)]
    gnd: list[_Truth]


_FILE = TypeAdapter(_File)


@final
class _Queries:
    """Images that are cropped to the box of the object when they are read."""

    def __init__(self, images: StoredImages, boxes: Sequence[Sequence[float]]) -> None:
        self._images, self._boxes = images, [[round(side) for side in box] for box in boxes]
        self.name, self.location = f"{images.name} queries", images.location
        self.classes, self.labels, self.notes = images.classes, images.labels, images.notes
        self.keys = images.keys

    @property
    def fingerprint(self) -> str:
        """Hash of the images and the boxes."""
        return hashlib.sha256(f"{self._images.fingerprint} {self._boxes}".encode()).hexdigest()

    def read(self, index: int) -> Tensor:
        """Read the part of an image inside its box, uint8 [3, H, W]."""
        left, top, right, bottom = (max(side, 0) for side in self._boxes[index])
        part = self._images.read(index)[:, top:bottom, left:right]
        if not part.numel():
            raise DataError(f"its box {self._boxes[index]} is empty or outside of the image")
        return part.contiguous()


def open_landmarks(
    folder: Path, *, limit: int | None, memo: Path | None, watch: ProgressFactory = no_progress
) -> Benchmark:
    """Open ROxford5k or RParis6k.

    Args:
        folder: has jpg/ and the ground truth, gnd_NAME.json.
        limit: number of queries at most, spread evenly.
        memo: a folder that caches content hashes of unchanged files.

    Raises:
        DataError: no ground truth, or one that contradicts itself.
        MissingDataError: an image that it names is absent.
    """
    path = _find_truth(folder)
    truth = read_json(path, _FILE, limit=MAX_DATA_BYTES)
    judged = _judgements(truth, path)
    count = len(truth["qimlist"])
    kept = range(count) if limit is None else [i * count // limit for i in range(min(limit, count))]
    names = [f"{number:03d}-{truth['qimlist'][number]}" for number in kept]
    files = [truth["qimlist"][number] for number in kept]
    name = path.stem.removeprefix("gnd_")
    database = _list_images(folder, name, truth["imlist"], truth["imlist"])
    queries = StoredImages(_list_images(folder, name, names, files), memo, watch)
    rows = torch.full((count,), -1)
    rows[torch.tensor(kept)] = torch.arange(len(kept))
    judged[:, 0] = rows[judged[:, 0]]
    return Benchmark(
        _Queries(queries, [truth["gnd"][number]["bbx"] for number in kept]),
        StoredImages(database, memo, watch),
        judged[judged[:, 0] >= 0],
        PROTOCOLS,
    )


def make_scenes(objects: int, distractors: int, *, seed: int, limit: int | None) -> Benchmark:
    """Make the generated world's twin: scenes as queries, and two further views of each in the database.

    The distractors are other scenes. Each class has as many of them as any other, so that who knows only the
    class of an object does not find it.
    """
    objects, distractors = (min(n, limit or n) for n in (objects, distractors))
    others = [(index, 0) for index in range(objects, objects + distractors)]
    views = [(index, view) for index in range(objects) for view in (1, 2)]
    judged = [(index, 2 * index + place, EASY) for index in range(objects) for place in (0, 1)]
    return Benchmark(
        SceneViews([(index, 0) for index in range(objects)], seed=seed),
        SceneViews([*views, *others], seed=seed),
        torch.tensor(judged),
        {"": ((EASY,), ())},
    )


def _find_truth(folder: Path) -> Path:
    paths = sorted(folder.glob("gnd_*.json"))
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise DataError(f"{shown(folder)}: has {paths[0].name} and {paths[1].name}; keep one")
    for pickled in sorted(folder.glob("gnd_*.pkl")):
        raise DataError(
            f"{shown(pickled)}: a pickle may run code when it is opened, so it is not; where you trust it, "
            f"convert it in {shown(folder)} by {_CONVERT.format(pickled.stem)}"
        )
    raise MissingDataError(f"{shown(folder)}: has no gnd_*.json; wanted the folder of ROxford5k or RParis6k")


def _judgements(truth: _File, path: Path) -> Tensor:
    """Return [M, 3] int64: query, image, grade."""
    count, num_queries = len(truth["imlist"]), len(truth["qimlist"])
    if len(truth["gnd"]) != num_queries:
        raise DataError(f"{shown(path)}: has {num_queries} queries in qimlist and {len(truth['gnd'])} in gnd")
    if escaping := [name for name in (*truth["imlist"], *truth["qimlist"]) if _leaves_folder(name)]:
        raise DataError(f"{shown(path)}: names the image {shown(escaping[0])}, which is not below jpg/")
    if count > len(set(truth["imlist"])):
        twice = next(name for name, times in Counter(truth["imlist"]).items() if times > 1)
        raise DataError(f"{shown(path)}: imlist names {shown(twice)} twice; list each image once")
    judged = []
    for query, each in enumerate(truth["gnd"]):
        ids = [*each["easy"], *each["hard"], *each["junk"]]
        wrong = next((id for id in ids if id >= count or ids.count(id) > 1), None)
        if wrong is not None:
            why = f"but imlist has {count} images" if wrong >= count else "twice"
            raise DataError(f"{shown(path)}: gnd[{query}] names the image {wrong} {why}")
        grades = [EASY] * len(each["easy"]) + [HARD] * len(each["hard"]) + [JUNK] * len(each["junk"])
        judged += [(query, id, grade) for id, grade in zip(ids, grades, strict=True)]
    return torch.tensor(judged, dtype=torch.int64).view(-1, 3)


def _leaves_folder(name: str) -> bool:
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


def _list_images(folder: Path, name: str, keys: Sequence[str], files: Sequence[str]) -> Listing:
    paths = [folder / "jpg" / f"{file}.jpg" for file in files]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise MissingDataError(
            f"{shown(absent[0])}: no such image ({len(absent):,} of {len(paths):,} are absent); unpack the "
            f"whole of them"
        )
    entries = [
        Entry(as_text(key), "", path, 0, path.stat().st_size) for key, path in zip(keys, paths, strict=True)
    ]
    return Listing(name, as_text(folder.resolve()), ("",), tuple(entries))

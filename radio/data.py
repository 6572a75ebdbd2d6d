"""Labelled images from a folder, tar shards, or the generated world, behind one interface."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError, did_you_mean, shown
from .image_files import StoredImages, list_folder, list_shards, spread
from .progress import ProgressFactory, no_progress
from .scenes import CLASSES, DOMAINS, SceneView, Split, label_of, render_domain, render_view

# Letters: N images, H W pixels.

_MAX_SCENES = 10_000_000
_PACKED = (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")


class ImageSource(Protocol):
    """N labelled images in a fixed order; keys and labels are known before any image is read."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    @property
    def location(self) -> str:
        """The resolved path or pattern, or `scenes:train?seed=0`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Name of each image, unique in the source."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, [N]."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for reports on omitted images, with the reason."""

    @property
    def fingerprint(self) -> str:
        """Hash of keys, classes and content. The first use may read everything once."""

    def read(self, index: int) -> Tensor:
        """Read an image, uint8 [3, H, W].

        Raises:
            DataError: it cannot be decoded.
        """


@final
class SceneImages:
    """Images of the generated world, rendered when they are read.

    Raises:
        DataError: an unknown split or domain, or fewer than one image.
    """

    def __init__(self, split: str, *, count: int, seed: int = 0, size: int = 96, domain: str = "own") -> None:
        if split not in get_args(Split):
            hint = did_you_mean(split, get_args(Split)) or f"; it has {' and '.join(get_args(Split))}"
            raise DataError(f"the generated world has no split {split!r}{hint}")
        if domain not in DOMAINS:
            hint = did_you_mean(domain, DOMAINS) or f"; it has {', '.join(DOMAINS)}"
            raise DataError(f"the generated world has no domain {domain!r}{hint}")
        if not 1 <= count <= _MAX_SCENES:
            raise DataError(f"cannot take {count} scenes; give a count of 1 to {_MAX_SCENES:,}")
        self._split: Split = "train" if split == "train" else "val"
        self._count, self._seed, self._size, self._domain = count, seed, size, domain
        self.name = f"scenes:{split}"
        self.location = f"{self.name}?seed={seed}" + (f"&domain={domain}" if domain != "own" else "")
        self.classes = CLASSES  # colour and shape of the main object
        self.notes: tuple[str, ...] = ()  # no image is omitted

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The index of each scene."""
        return tuple(f"{self._split}/{index:06d}" for index in range(self._count))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, [N]."""
        labels = [label_of(index, split=self._split, seed=self._seed) for index in range(self._count)]
        return np.array(labels, dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the generator's settings and of the first few images, in case the generator changes."""
        drawn = b"".join(self._draw(index).tobytes() for index in range(min(self._count, 8)))
        text = f"{self.location} {self._count} {self._size}"
        return hashlib.sha256(text.encode() + drawn).hexdigest()

    def read(self, index: int) -> Tensor:
        """Render a scene, uint8 [3, size, size]."""
        return torch.from_numpy(self._draw(index))

    load = read  # a scene has no file

    def _draw(self, index: int) -> NDArray[np.uint8]:
        return render_domain(index, domain=self._domain, split=self._split, seed=self._seed, size=self._size)


@final
class SceneViews:
    """Views of scenes of the generated world's val split, rendered when they are read.

    Args:
        views: (index of the scene, number of the view) of each image, all different.
    """

    name = "scenes:val"
    classes = CLASSES  # colour and shape of the main object
    notes: tuple[str, ...] = ()  # no image is omitted

    def __init__(self, views: Sequence[tuple[int, int]], *, seed: int = 0, size: int = 96) -> None:
        self.views, self._seed, self._size = tuple(views), seed, size
        self.location = f"{self.name}?seed={seed}"

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The index of each scene and the number of the view."""
        return tuple(f"val/{index:06d}-{view}" for index, view in self.views)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, [N]."""
        labels = [label_of(index, split="val", seed=self._seed) for index, _ in self.views]
        return np.array(labels, dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the keys, and of the first few images, in case the generator changes."""
        drawn = b"".join(self.draw(number).scene.image.tobytes() for number in range(min(len(self.views), 8)))
        text = f"{self.location} {self._size} {' '.join(self.keys)}"
        return hashlib.sha256(text.encode() + drawn).hexdigest()

    def draw(self, number: int) -> SceneView:
        """Render a view with its labels."""
        index, view = self.views[number]
        return render_view(index, view, split="val", seed=self._seed, size=self._size)

    def read(self, index: int) -> Tensor:
        """Render an image, uint8 [3, size, size]."""
        return torch.from_numpy(self.draw(index).scene.image)


def open_source(
    text: str,
    *,
    limit: int | None = None,
    scenes: int = 1500,
    seed: int = 0,
    memo: Path | None = None,
    watch: ProgressFactory = no_progress,
) -> ImageSource:
    """Open the image source that a string names.

    Args:
        text: `scenes:train` or `scenes:val`; a folder with one folder a class; a tar file, a pattern such
            as `photos-{000000..000003}.tar`, or a folder of tar files (WebDataset: image and `.cls`).
        limit: maximum number of images, spread evenly over all.
        scenes: number of images of the generated world.
        seed: seed of the generated world.
        memo: a folder that caches content hashes of unchanged files.
        watch: shows the progress of the hashing, where `memo` has no hash.

    Raises:
        DataError: nothing exists at the path, it is empty, or its layout is unknown.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no images; give 1 or more, or leave it out")
    if text.startswith("scenes:"):
        count = scenes if limit is None else min(scenes, limit)
        return SceneImages(text.removeprefix("scenes:"), count=count, seed=seed)
    path = Path(text)
    if path.suffix == ".tar" or "{" in text:
        listing = list_shards(text)
    elif path.is_dir():
        listing = list_shards(str(path)) if any(path.glob("*.tar")) else list_folder(path)
    else:
        raise DataError(f"{shown(text)}: {_why_none(path)}")
    return StoredImages(listing._replace(entries=spread(listing.entries, limit)), memo, watch)


def aligned_labels(source: ImageSource, reference: ImageSource) -> NDArray[np.int64]:
    """Map the labels [N] of `source` to indices into the classes of `reference`; see `aligned_classes`."""
    return aligned_classes(source, reference)[source.labels]


def aligned_classes(source: ImageSource, reference: ImageSource) -> NDArray[np.int64]:
    """Map the classes of `source` to indices into those of `reference`.

    Names that differ only in the Unicode form of their accents are equal, and so are 7 and 07. Where one has
    ImageNet's WordNet ids and the other numbers, these are ImageNet's class numbers, from 0.

    Raises:
        DataError: `reference` lacks a class of `source`, or has it twice.
    """
    if source.classes == reference.classes:
        return np.arange(len(source.classes))
    names = _as_spelled_in(reference.classes, source.classes)
    places = {name: place for place, name in enumerate(reference.classes)}
    alike: dict[str, list[int]] = {}
    for name, place in places.items():
        alike.setdefault(one_form(name), []).append(place)
    matches = [[places[name]] if name in places else alike.get(one_form(name), []) for name in names]
    foreign = [name for name, known in zip(source.classes, matches, strict=True) if not known]
    if foreign:
        raise DataError(
            f"{source.name} has {len(foreign)} classes that {reference.name} lacks, "
            f"the first is {foreign[0]!r}{_near(foreign[0], reference.classes)}"
        )
    for name, known in zip(source.classes, matches, strict=True):
        if len(known) > 1:
            raise DataError(
                f"{reference.name} has {len(known)} classes that are called {name!r} but for how accents "
                f"or numbers are written; make them one"
            )
    return np.array([place for (place,) in matches], dtype=np.int64)


def _as_spelled_in(reference: Sequence[str], names: Sequence[str]) -> list[str]:
    """Translate ImageNet's class numbers to its WordNet ids, or back, where the reference has the other.

    Numbers of the reference have to be all of 0 to 999: those of a part may count from anywhere.
    """
    numbers = imagenet_numbers() if are_wordnet_ids(reference) or are_wordnet_ids(names) else {}
    if numbers and all(name in numbers for name in reference) and all(map(str.isdecimal, names)):
        ids = {str(number): synset for synset, number in numbers.items()}
        return [ids.get(one_form(name), name) for name in names]
    if numbers and {one_form(name) for name in reference} == set(map(str, numbers.values())):
        return [str(numbers.get(name, name)) for name in names]
    return list(names)


def _near(name: str, classes: Sequence[str]) -> str:
    """Suggest classes similar to a name that is no number, else list the first classes."""
    hint = "" if name.isdecimal() else did_you_mean(name, classes)
    more = "…" if len(classes) > 5 else ""
    return hint or f"; it has {', '.join(classes[:5])}{more}"


def _why_none(path: Path) -> str:
    """Explain why a path that is neither a folder nor shards cannot be read."""
    try:
        there = path.exists()
    except OSError:  # an invalid file name
        there = False
    if not there:
        return f"no such folder{_neighbours(path)}"
    packed = path.suffix.lower() in _PACKED
    return f"is a file; wanted a folder, or an uncompressed .tar{': unpack it' if packed else ''}"


def _neighbours(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f", nor {parent}"
    return did_you_mean(path.name, (child.name for child in parent.iterdir() if child.is_dir()))


_WORDNET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(\d{1,9})(?:[:,;.)]\s*|\s+)(\S.*)")
_MAX_DIGITS = 4000  # that Python converts to an integer
_DIGITS = re.compile(r"([0-9]+)")


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Check whether all names are WordNet ids, as the folders of ImageNet are."""
    return all(_WORDNET.fullmatch(name) for name in names)


@cache
def imagenet_numbers() -> dict[str, int]:
    """Return the class number, from 0, of each of ImageNet's 1000 WordNet ids."""
    from timm.data.imagenet_info import ImageNetInfo

    return {synset: number for number, synset in enumerate(ImageNetInfo().label_names())}


def composed(name: str) -> str:
    """Normalise the accents of a name to NFC."""
    return unicodedata.normalize("NFC", name)


def one_form(name: str) -> str:
    """Normalise a name, so that equal ones match: accents in NFC, numbers without leading zeros."""
    return str(int(name)) if name.isdecimal() and len(name) < _MAX_DIGITS else composed(name)


def numbered(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Split lines such as `0 tench` or `1: tench` into number and name; empty unless every line has both."""
    pairs = [_NUMBERED.fullmatch(line) for line in lines]
    numbered = [(int(pair[1]), pair[2]) for pair in pairs if pair]
    return numbered if len(numbered) == len(lines) > 1 else []


def order_by_number(names: Sequence[str]) -> list[int]:
    """Return the indices that sort names with the numbers in them by value: class_2 before class_10."""

    def key(place: int) -> list[tuple[int, str]]:
        parts = _DIGITS.split(names[place])  # alternating texts and digits
        digits = {i: parts[i].lstrip("0") for i in range(1, len(parts), 2)}
        return [(len(digits[i]), digits[i]) if i in digits else (0, part) for i, part in enumerate(parts)]

    return sorted(range(len(names)), key=key)


def shown_order(names: Sequence[str], places: Sequence[int]) -> str:
    """Join the first four names in the given order, for a message."""
    return ", ".join(names[place] for place in places[:4]) + (", …" if len(places) > 4 else "")

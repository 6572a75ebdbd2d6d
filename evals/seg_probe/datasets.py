"""Images with a class for every pixel, in the layouts of ADE20K and VOC2012: listing and validation."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radio.data import composed, numbered
from radio.errors import DataError, shown
from radio.image_files import as_text
from radio.images import IMAGE_ENDINGS
from radio.io import lines_of, read_text

VOID = 255
"""Class of pixels that are ignored in training and scoring, after labels are mapped."""

_LONGEST = 240  # bytes of a name; file systems take 255, with the ending
_ADE_MARKS = ("objectInfo150.txt", "sceneCategories.txt")
_VOC_FOLDERS = ("JPEGImages", "ImageSets/Segmentation")
_ADE_COUNTS, _VOC_COUNTS = (20_210, 2_000), {"train": 1_464, "trainaug": 10_582, "val": 1_449}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelling:
    """The meaning of the numbers in annotation files."""

    classes: tuple[str, ...]
    zero_is_void: bool  # ADE20K: 0 is void and class i is written i + 1; else class i is written i

    @property
    def highest(self) -> int:
        """The largest label of a class."""
        return len(self.classes) - (not self.zero_is_void)

    def table(self) -> NDArray[np.uint8]:
        """Build the lookup table [256] from a label to the index of its class, or `VOID`."""
        table = np.full(256, VOID, dtype=np.uint8)
        first = int(self.zero_is_void)
        table[first : first + len(self.classes)] = np.arange(len(self.classes), dtype=np.uint8)
        return table

    def describe(self) -> str:
        """Describe the valid labels in words."""
        void = "0 and 255 for void" if self.zero_is_void else "255 for void"
        return f"{int(self.zero_is_void)} to {self.highest} for the {len(self.classes)} classes, {void}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Training and validation images under one labelling."""

    labelling: Labelling
    train: Split
    val: Split
    notes: tuple[str, ...] = ()


def open_dataset(
    root: Path, *, voc_split: str, known: Mapping[str, Sequence[str]], limit: int | None = None
) -> Dataset:
    """Open the data set in a folder; the content of its files is not read yet.

    Args:
        root: ADE20K's or VOC2012's folder or its parent; or one in ADE20K's layout with `classes.txt`.
        voc_split: the training split of VOC2012.
        known: the class names of "ADE20K" and "VOC2012".
        limit: maximum number of images per split, evenly spaced.

    Raises:
        DataError: neither layout, an empty split, an image without annotation, or the reverse.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if all((folder / part).is_dir() for part in _VOC_FOLDERS):
            return _voc(folder, voc_split, tuple(known["VOC2012"]), limit)
    for folder in (root, root / "ADEChallengeData2016"):
        if (folder / "images").is_dir() and (folder / "annotations").is_dir():
            return _ade(folder, tuple(known["ADE20K"]), limit)
    raise DataError(
        f"{root}: neither ADE20K (images/training, annotations/training, ...) nor VOC2012 (JPEGImages, "
        f"SegmentationClass, ImageSets/Segmentation); bring your own data into the layout of ADE20K"
    )


def _ade(root: Path, classes: tuple[str, ...], limit: int | None) -> Dataset:
    listed = root / "classes.txt"
    genuine = not listed.is_file()
    if listed.is_file():
        classes = _read_classes(listed)
    elif root.name != "ADEChallengeData2016" and not any((root / mark).is_file() for mark in _ADE_MARKS):
        raise DataError(
            f"{root}: has no classes.txt, and none of {', '.join(_ADE_MARKS)} that tell ADE20K; write one "
            f"class a line into classes.txt (label 1 is the first line, label 0 is void)"
        )
    splits = [_ade_split(root, name) for name in ("training", "validation")]
    notes = _count_notes("ADE20K", zip(splits, _ADE_COUNTS, strict=True)) if genuine else ()
    train, val = (_limited(split, limit) for split in splits)
    return Dataset(labelling=Labelling(classes=classes, zero_is_void=True), train=train, val=val, notes=notes)


def _ade_split(root: Path, name: str) -> Split:
    images, labels = root / "images" / name, root / "annotations" / name
    for folder in (images, labels):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; wanted images in {images} and masks in {labels}")
    found = _by_stem(images, IMAGE_ENDINGS, "would share the mask {}.png")
    masks = _by_stem(labels, (".png",), "would both be the mask of {}")
    if not found:
        raise DataError(f"{images}: holds no images")
    _check_matching(found, masks, labels)
    pairs = sorted(
        Pair(key=as_text(path.stem), image=path, labels=masks[stem]) for stem, path in found.items()
    )
    return Split(
        name=f"{as_text(root.resolve().name)}/{name}",
        location=as_text(images.resolve()),
        pairs=tuple(pairs),
    )


def _by_stem(folder: Path, endings: tuple[str, ...], clash: str) -> dict[str, Path]:
    """Index the files of a folder by their stem in NFC, which images and masks share."""
    found: dict[str, Path] = {}
    for path in _files(folder, endings):
        stem = composed(path.stem)
        if stem in found:
            raise DataError(
                f"{shown(folder)}: {shown(found[stem].name)} and {shown(path.name)} "
                f"{clash.format(shown(path.stem))}; give each a name of its own"
            )
        found[stem] = path
    return found


def _check_matching(found: Mapping[str, Path], masks: Mapping[str, Path], labels: Path) -> None:
    missing = sorted(found.keys() - masks.keys())
    if missing:
        raise DataError(
            f"{shown(found[missing[0]])}: has no annotation {shown(labels / missing[0])}.png "
            f"({len(missing)} of {len(found)} images lack theirs)"
        )
    spare = sorted(masks.keys() - found.keys())
    if spare:
        raise DataError(f"{shown(masks[spare[0]])}: has no image of its name ({len(spare)} such annotations)")


def _voc(root: Path, voc_split: str, classes: tuple[str, ...], limit: int | None) -> Dataset:
    named = [("train", _voc_train(root, voc_split)), ("val", _voc_ids(root, "val"))]
    splits = [
        Split(
            name=f"VOC2012/{voc_split if role == 'train' else role}",
            location=str(root.resolve()),
            pairs=tuple(_voc_pair(root, key) for key in ids),
        )
        for role, ids in named
    ]
    counts = (_VOC_COUNTS[voc_split], _VOC_COUNTS["val"])
    train, val = (_limited(split, limit) for split in splits)
    return Dataset(
        labelling=Labelling(classes=classes, zero_is_void=False),
        train=train,
        val=val,
        notes=(*_count_notes("VOC2012", zip(splits, counts, strict=True)), *_overlap_notes(splits)),
    )


def _voc_train(root: Path, voc_split: str) -> list[str]:
    """Read the training names; `trainaug` is one list, or `train` and `aug` (MMSegmentation's converter)."""
    lists = root / "ImageSets" / "Segmentation"
    if voc_split == "trainaug" and not (lists / "trainaug.txt").is_file():
        if not (lists / "aug.txt").is_file():
            raise DataError(
                f"{lists / 'trainaug.txt'}: no such list, nor aug.txt; --voc-split trainaug needs SBD's "
                f"annotations in SegmentationClassAug, or use --voc-split train"
            )
        return list(dict.fromkeys([*_voc_ids(root, "train"), *_voc_ids(root, "aug")]))
    return _voc_ids(root, voc_split)


def _voc_ids(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        raise DataError(f"{path}: no such list of images")
    # Some copies of trainaug.txt have both paths on a line; the image's name is the first one's stem.
    ids = [_name_of(line.split()[0]) for line in lines_of(read_text(path)) if line.strip()]
    if not ids:
        raise DataError(f"{path}: lists no images")
    impossible = [key for key in ids if not 0 < len(key.encode()) <= _LONGEST or "\0" in key]
    if impossible:
        raise DataError(f"{path}: {shown(impossible[0][:60])!r} is no name of an image; wanted one a line")
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: lists {twice[0]!r} more than once ({len(twice)} of {len(set(ids))} names are "
            f"repeated); list each image once"
        )
    return ids


def _name_of(path: str) -> str:
    """Return the name that image and mask share: the last path component without an image extension."""
    name = path.replace("\\", "/").rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return stem if f"{dot}{ending}".lower() in IMAGE_ENDINGS and stem else name


def _voc_pair(root: Path, key: str) -> Pair:
    """Pair an image with VOC's own annotation if it exists, else with SBD's."""
    image = _existing(root / "JPEGImages" / f"{key}.jpg")
    if image is None:
        raise DataError(
            f"{shown(root / 'JPEGImages' / key)}.jpg: no such image, and ImageSets/Segmentation lists it"
        )
    candidates = [root / folder / f"{key}.png" for folder in ("SegmentationClass", "SegmentationClassAug")]
    for candidate in candidates:
        labels = _existing(candidate)
        if labels is not None:
            return Pair(key, image, labels)
    raise DataError(
        f"{shown(image)}: has no annotation, neither {shown(candidates[0])} nor {shown(candidates[1])}"
    )


def _existing(path: Path) -> Path | None:
    """Find the file of this name, with its accents composed or decomposed."""
    names = (path.name, composed(path.name), unicodedata.normalize("NFD", path.name))
    return next((found for name in names if (found := path.with_name(name)).is_file()), None)


def _read_classes(path: Path) -> tuple[str, ...]:
    names = [line.strip() for line in lines_of(read_text(path)) if line.strip()]
    if not 2 <= len(names) <= VOID - 1:
        raise DataError(f"{path}: lists {len(names)} classes; wanted 2 to {VOID - 1}, one a line")
    pairs = numbered(names)
    if pairs and [number for number, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise DataError(
            f"{path}: numbers its classes from {pairs[0][0]}, and label 1 is the first line; list them in "
            f"the order of their labels, from 1 on, without numbers, and leave the void out"
        )
    names = [composed(name) for _, name in pairs] or [composed(name) for name in names]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: lists {twice!r} twice")
    return tuple(names)


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in endings and not path.name.startswith(".")
    ]


def _limited(split: Split, limit: int | None) -> Split:
    count = len(split.pairs)
    if limit is None or limit >= count:
        return split
    pairs = tuple(split.pairs[place * count // limit] for place in range(limit))
    return Split(name=split.name, location=split.location, pairs=pairs)


def _overlap_notes(splits: Sequence[Split]) -> tuple[str, ...]:
    """Note images that are both in training and validation: the original SBD lists overlap VOC's val."""
    train, val = ({pair.key for pair in split.pairs} for split in splits)
    both = len(train & val)
    return (f"{both} of the {len(val)} images of val are also trained on",) if both else ()


def _count_notes(name: str, splits: Iterable[tuple[Split, int]]) -> tuple[str, ...]:
    return tuple(
        f"{split.name} has {len(split.pairs):,} images; {name} has {count:,}"
        for split, count in splits
        if len(split.pairs) != count
    )

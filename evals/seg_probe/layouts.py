"""Data sets of label maps on disk: found by the layout of their folders, and listed."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from radio.data import composed, numbered
from radio.errors import DataError, MissingDataError, shown
from radio.image_files import as_text, spread
from radio.images import IMAGE_ENDINGS
from radio.io import lines_of, read_text

from .data import VOID, Dataset, Labelling, Pair, Part, Split
from .protocol import Layout

_LONGEST = 240  # bytes of a name; file systems take 255, with the ending
_ADE_MARKS = ("objectInfo150.txt", "sceneCategories.txt")
_CONTEXT = ("JPEGImages", "ImageSets/SegmentationContext", "SegmentationClassContext")
_LAYOUTS: tuple[tuple[Layout, tuple[str, ...], tuple[str, ...]], ...] = (  # homes, and what each has in them
    ("context", ("",), _CONTEXT),
    ("voc", ("", "VOC2012", "VOCdevkit/VOC2012"), ("JPEGImages", "ImageSets/Segmentation")),
    ("context", ("VOC2010", "VOCdevkit/VOC2010"), _CONTEXT),
    ("coco-stuff", ("", "coco_stuff164k"), ("images/val2017", "annotations/val2017")),
    ("ade20k", ("", "ADEChallengeData2016"), ("images", "annotations")),
)
_ADE_COUNTS, _VOC_COUNTS = (20_210, 2_000), {"train": 1_464, "trainaug": 10_582, "val": 1_449}
_CONTEXT_COUNTS, _STUFF_COUNTS = (4_996, 5_104), (118_287, 5_000)
_NAMES: Mapping[Layout, str] = {
    "ade20k": "ADE20K",
    "voc": "VOC2012",
    "context": "Pascal Context",
    "coco-stuff": "COCO-Stuff",
}


def open_dataset(
    root: Path,
    *,
    voc_split: str | None,
    known: Mapping[str, Sequence[str]],
    limit: int | None = None,
    layout: Layout | None = None,
    parts: Sequence[Part] = ("train", "val"),
) -> Dataset:
    """Open the data set in a folder; the content of its files is not read yet.

    Args:
        root: the folder of ADE20K, VOC2012, Pascal Context or COCO-Stuff or its parent; or one in ADE20K's
            layout with `classes.txt`.
        voc_split: the training split of VOC2012 (default: train); a folder that is in VOC2012's layout and
            in Pascal Context's is then opened as VOC2012.
        known: the class names of these data sets.
        limit: maximum number of images per split, evenly spaced.
        layout: the data set's (default: told by its folders).
        parts: the splits that are listed; another is empty, and need not be there.

    Raises:
        DataError: no such layout, an empty split, an image without annotation, or the reverse; or a split of
            VOC2012 for another layout.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    layouts = _LAYOUTS if voc_split is None else sorted(_LAYOUTS, key=lambda each: each[0] != "voc")
    for name, homes, folders in layouts:
        for folder in (root / home for home in homes):
            if layout in (None, name) and all((folder / part).is_dir() for part in folders):
                if name == "voc":
                    return _voc(folder, voc_split or "train", tuple(known["VOC2012"]), limit, parts)
                if voc_split is not None:
                    raise DataError(
                        f"{folder}: is in the layout of {_NAMES[name]}, and --voc-split {voc_split} is of "
                        f"VOC2012; leave it out"
                    )
                opened = {"ade20k": _ade, "context": _context, "coco-stuff": _stuff}[name]
                return opened(folder, tuple(known[_NAMES[name]]), limit, parts)
    if layout is not None:
        raise DataError(f"{root}: is not in the layout of {_NAMES[layout]}; see docs/evaluators.md")
    raise DataError(
        f"{root}: neither ADE20K (images/training, annotations/training, ...) nor VOC2012 (JPEGImages, "
        f"SegmentationClass, ImageSets/Segmentation), Pascal Context (SegmentationClassContext) or "
        f"COCO-Stuff (images/val2017, annotations/val2017); bring your own data into the layout of ADE20K"
    )


def _ade(root: Path, classes: tuple[str, ...], limit: int | None, parts: Sequence[Part]) -> Dataset:
    listed = root / "classes.txt"
    genuine = not listed.is_file()
    if not genuine:
        classes = _read_classes(listed)
    elif root.name != "ADEChallengeData2016" and not any((root / mark).is_file() for mark in _ADE_MARKS):
        raise DataError(
            f"{root}: has no classes.txt, and none of {', '.join(_ADE_MARKS)} that tell ADE20K; write one "
            f"class a line into classes.txt (label 1 is the first line, label 0 is void)"
        )
    names: dict[Part, str] = {"train": "training", "val": "validation"}
    splits = {part: _ade_split(root, names[part]) for part in parts}
    notes = _count_notes("ADE20K", splits, _ADE_COUNTS) if genuine else ()
    return _assemble(Labelling(classes=classes, zero_is_void=True), splits, limit, notes)


def _assemble(
    labelling: Labelling, splits: Mapping[Part, Split], limit: int | None, notes: Sequence[str]
) -> Dataset:
    empty = Split(name="", location="", pairs=())
    limited = {part: replace(each, pairs=spread(each.pairs, limit)) for part, each in splits.items()}
    train, val = limited.get("train", empty), limited.get("val", empty)
    return Dataset(labelling=labelling, train=train, val=val, notes=tuple(notes))


def _ade_split(root: Path, name: str) -> Split:
    folders = root / "images" / name, root / "annotations" / name
    for folder in folders:
        if not folder.is_dir():
            raise MissingDataError(
                f"{folder}: no such folder; wanted images in {folders[0]} and masks in {folders[1]}"
            )
    images = _by_stem(folders[0], IMAGE_ENDINGS, "would share the mask {}.png")
    masks = _by_stem(folders[1], (".png",), "would both be the mask of {}")
    if not images:
        raise DataError(f"{folders[0]}: holds no images")
    missing = sorted(images.keys() - masks.keys())
    if missing:
        raise MissingDataError(
            f"{shown(images[missing[0]])}: has no annotation {shown(folders[1] / missing[0])}.png "
            f"({len(missing)} of {len(images)} images lack theirs)"
        )
    spare = sorted(masks.keys() - images.keys())
    if spare:
        raise MissingDataError(
            f"{shown(masks[spare[0]])}: has no image of its name ({len(spare)} such annotations)"
        )
    pairs = sorted(Pair(as_text(path.stem), path, masks[stem]) for stem, path in images.items())
    return Split(
        name=f"{as_text(root.resolve().name)}/{name}",
        location=as_text(folders[0].resolve()),
        pairs=tuple(pairs),
    )


def _by_stem(folder: Path, endings: tuple[str, ...], clash: str) -> dict[str, Path]:
    """Index the files of a folder by their stem in NFC, which images and masks share."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in endings or path.name.startswith("."):
            continue
        stem = composed(path.stem)
        if stem in files:
            raise DataError(
                f"{shown(folder)}: {shown(files[stem].name)} and {shown(path.name)} "
                f"{clash.format(shown(path.stem))}; give each a name of its own"
            )
        files[stem] = path
    return files


def _voc(
    root: Path, voc_split: str, classes: tuple[str, ...], limit: int | None, parts: Sequence[Part]
) -> Dataset:
    lists = root / "ImageSets" / "Segmentation"
    names = {"train": voc_split, "val": "val"}
    keys = {
        part: _voc_trained(lists, voc_split) if part == "train" else _voc_ids(lists / "val.txt")
        for part in parts
    }
    splits = {
        part: Split(
            name=f"VOC2012/{names[part]}",
            location=str(root.resolve()),
            pairs=tuple(_voc_pair(root, key) for key in keys[part]),
        )
        for part in parts
    }
    notes = _count_notes("VOC2012", splits, (_VOC_COUNTS[voc_split], _VOC_COUNTS["val"]))
    # The original SBD lists overlap VOC's val.
    both = len(set(keys.get("train", ())) & set(keys.get("val", ())))
    if both:
        notes += (f"{both} of the {len(keys['val'])} images of val are also trained on",)
    return _assemble(Labelling(classes=classes, zero_is_void=False), splits, limit, notes)


def _voc_trained(lists: Path, voc_split: str) -> list[str]:
    names = [voc_split]
    if voc_split == "trainaug" and not (lists / "trainaug.txt").is_file():
        names = ["train", "aug"]  # as MMSegmentation's converter writes it
        if not (lists / "aug.txt").is_file():
            raise MissingDataError(
                f"{lists / 'trainaug.txt'}: no such list, nor aug.txt; --voc-split trainaug needs SBD's "
                f"annotations in SegmentationClassAug, or use --voc-split train"
            )
    return list(dict.fromkeys(key for name in names for key in _voc_ids(lists / f"{name}.txt")))


def _context(root: Path, classes: tuple[str, ...], limit: int | None, parts: Sequence[Part]) -> Dataset:
    """Open Pascal Context as MMSegmentation's converter writes it: 0 is the background of 59 classes."""
    lists, splits = root / "ImageSets" / "SegmentationContext", {}
    for part in parts:
        pairs = []
        for key in _voc_ids(lists / f"{part}.txt"):
            found = Pair(key, root / f"JPEGImages/{key}.jpg", root / f"SegmentationClassContext/{key}.png")
            _check_files(found)
            pairs.append(found)
        splits[part] = Split(name=f"Context/{part}", location=str(root.resolve()), pairs=tuple(pairs))
    notes = _count_notes("Pascal Context", splits, _CONTEXT_COUNTS)
    return _assemble(Labelling(classes=classes, zero_is_void=False), splits, limit, notes)


def _stuff(root: Path, classes: tuple[str, ...], limit: int | None, parts: Sequence[Part]) -> Dataset:
    """Open COCO-Stuff 164k as MMSegmentation's converter writes it: 171 classes in *_labelTrainIds.png."""
    splits = {}
    for part in parts:
        name = f"{part}2017"
        images, labels = root / "images" / name, root / "annotations" / name
        if not images.is_dir():
            raise MissingDataError(f"{images}: no such folder")
        pairs = []
        for path in sorted(images.glob("*.jpg")):
            found = Pair(path.stem, path, labels / f"{path.stem}_labelTrainIds.png")
            _check_files(found)
            pairs.append(found)
        if not pairs:
            raise DataError(f"{images}: holds no images")
        splits[part] = Split(name=f"COCO-Stuff/{name}", location=str(images.resolve()), pairs=tuple(pairs))
    notes = _count_notes("COCO-Stuff", splits, _STUFF_COUNTS)
    return _assemble(Labelling(classes=classes, zero_is_void=False), splits, limit, notes)


def _check_files(pair: Pair) -> None:
    for path in (pair.image, pair.labels):
        if not path.is_file():
            raise MissingDataError(f"{shown(path)}: no such file, and its partner or list is there")


def _voc_ids(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingDataError(f"{path}: no such list of images")
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
        raise MissingDataError(
            f"{shown(root / 'JPEGImages' / key)}.jpg: no such image, and ImageSets/Segmentation lists it"
        )
    candidates = [root / folder / f"{key}.png" for folder in ("SegmentationClass", "SegmentationClassAug")]
    labels = _existing(candidates[0]) or _existing(candidates[1])
    if labels is not None:
        return Pair(key, image, labels)
    raise MissingDataError(
        f"{shown(image)}: has no annotation, neither {shown(candidates[0])} nor {shown(candidates[1])}"
    )


def _existing(path: Path) -> Path | None:
    """Find the file of this name, with its accents composed or decomposed."""
    names = (path.name, composed(path.name), unicodedata.normalize("NFD", path.name))
    paths = (path.with_name(name) for name in names)
    return next((path for path in paths if path.is_file()), None)


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


def _count_notes(name: str, splits: Mapping[Part, Split], counts: tuple[int, int]) -> tuple[str, ...]:
    """Note the splits whose number of images is not the published one, `counts` of train and val."""
    published: dict[Part, int] = {"train": counts[0], "val": counts[1]}
    return tuple(
        f"{split.name} has {len(split.pairs):,} images; {name} has {published[part]:,}"
        for part, split in splits.items()
        if len(split.pairs) != published[part]
    )

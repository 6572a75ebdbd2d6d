"""Texts for images: names of classes, the templates that the names are inserted into, and captions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from radio.data import (
    ImageSource,
    SceneImages,
    are_wordnet_ids,
    composed,
    imagenet_numbers,
    numbered,
    order_by_number,
    shown_order,
)
from radio.errors import DataError, did_you_mean, require, shown
from radio.image_files import Entry, Listing, StoredImages
from radio.io import MAX_DATA_BYTES, brief, parse_json, read_text, validate
from radio.scenes import TEMPLATES, render
from radio.scenes import captions as scene_captions

# Letters: N images.

_MOST_BYTES = 4 << 20  # of names or templates: ImageNet-21k's take 0.6 MB

_WITH_ID = re.compile(r"(n\d{8})[\s,:]+(\S.*)")
_QUOTED = re.compile(r"""["'].*["'],?""")
_LIST = TypeAdapter(list[str])
_NUMBERED = TypeAdapter(dict[str, str | list[str]])  # as imagenet_class_index.json: number -> [id, name]


class Named(NamedTuple):
    """Names of the classes, and the images' labels."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]  # [N], indices into the names
    notes: tuple[str, ...] = ()


def name_classes(source: ImageSource, file: str | None = None) -> Named:
    """Return the class names of a source, and its labels as indices into them.

    Without `file` the names are those of the folders, with `_` replaced by a space; WordNet ids get
    ImageNet's names. `imagenet` uses all of its 1000 names. A file has one name per line, or is a JSON list:
    names equal to those of the folders (or WordNet ids before the names) are matched, numbered classes are
    indices into it, else the names are in the order of the folders, with numbers in these sorted by value.

    Raises:
        DataError: classes without a name, two with the same name, or a file that does not match them.
    """
    classes = source.classes
    if file is None:
        if are_wordnet_ids(classes):
            every, places = imagenet_names(), _synset_places(source)
            return Named(tuple(every[place] for place in places), source.labels)
        if all(name.isdecimal() for name in classes):
            raise DataError(
                f"{source.name}: its classes are numbers, not names; give --class-names imagenet, or a "
                f"file with one name a line"
            )
        _check_different(source.name, [_spoken(name) for name in classes], classes)
        return Named(tuple(map(_spoken, classes)), source.labels)
    names = imagenet_names() if file == "imagenet" else read_names(file)
    places, notes = _places(source, names, file)
    _check_different(source.name, places, classes)
    _, spoken = _without_ids(names)
    return Named(spoken, np.array(places, dtype=np.int64)[source.labels], notes)


def imagenet_names() -> tuple[str, ...]:
    """Return open_clip's names of ImageNet's 1000 classes (998 distinct), in the usual order.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    return tuple(require("open_clip", extra="zeroshot").IMAGENET_CLASSNAMES)


def read_templates(file: str | None, *, scenes: bool) -> tuple[str, ...]:
    """Read the templates of a named set or a file, each with `{}` for the class name.

    Args:
        file: `openai` (80), `simple` (7), `scenes` (8) or a file (default: `scenes` for the generated
            world, else `openai`).

    Raises:
        DataError: no such file, or a line without `{}`.
        MissingExtraError: open_clip is not installed.
    """
    name = file or ("scenes" if scenes else "openai")
    if name == "scenes":
        return TEMPLATES
    if name in ("openai", "simple"):
        library = require("open_clip", extra="zeroshot")
        made: Sequence[Callable[[str], str]] = (
            library.OPENAI_IMAGENET_TEMPLATES if name == "openai" else library.SIMPLE_IMAGENET_TEMPLATES
        )
        return tuple(template("{}") for template in made)
    lines = _read_texts(name, "templates (or openai, simple, scenes)")
    for number, line in enumerate(lines, start=1):
        if line.count("{}") != 1:
            raise DataError(
                f"{name}: template {number} is {brief(line)}; wanted {{}} once, where the name goes"
            )
    return lines


def _spoken(name: str) -> str:
    """Write a folder's name as a class name, in the Unicode form in which names are compared."""
    return composed(name.replace("_", " "))


def _matched_loosely(name: str) -> str:
    """Normalise a name for matching without case, if no exact match exists."""
    return _spoken(name).lower()


def _by_name(names: Sequence[str], matched: Callable[[str], str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(matched(name), []).append(place)
    return places


def _synset_places(source: ImageSource) -> list[int]:
    order = imagenet_numbers()
    unknown = [name for name in source.classes if name not in order]
    if unknown:
        raise DataError(
            f"{source.name}: {unknown[0]} is none of ImageNet's 1000 classes ({len(unknown)} of "
            f"{len(source.classes)} are not); name the classes with --class-names FILE"
        )
    return [order[name] for name in source.classes]


def _places(source: ImageSource, names: tuple[str, ...], file: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the index of each class's name in `names`, and notes on the matching."""
    classes = source.classes
    if file == "imagenet" and are_wordnet_ids(classes):
        return _synset_places(source), ()
    if all(name.isdecimal() for name in classes):
        high = max(int(name) for name in classes)
        if high >= len(names):
            raise DataError(
                f"{source.name} has a class {high}, and {file} names classes 0 to {len(names) - 1}"
            )
        return [int(name) for name in classes], ()
    ids, spoken = _without_ids(names)
    by_id = bool(ids) and are_wordnet_ids(classes)
    exact, alike = _by_name(ids if by_id else spoken, _spoken), _by_name(spoken, _matched_loosely)
    matches = [exact.get(_spoken(name)) or alike.get(_matched_loosely(name), []) for name in classes]
    _check_single(file, classes, matches)
    places = [place for known in matches for place in known]
    if len(places) == len(classes):
        return places, ()
    if places or by_id or len(names) != len(classes):
        missing = classes[matches.index([])]
        hint = "" if missing.isdecimal() else did_you_mean(_matched_loosely(missing), alike)
        raise DataError(
            f"{file} has {len(names)} names for the {len(classes)} classes of {source.name}, and none is "
            f"{missing!r}{hint}; give one line for each folder, in their order, or the folders' own names"
        )
    return _in_order(classes, file)


def _in_order(classes: Sequence[str], file: str) -> tuple[list[int], tuple[str, ...]]:
    """Assign names to the folders in numeric order; sorted as texts, class_10 would precede class_2."""
    order = order_by_number(classes)
    if order == list(range(len(classes))):
        return order, ()
    places = [0] * len(classes)
    for place, number in enumerate(order):
        places[number] = place
    order_shown = shown_order(classes, order)
    return places, (
        f"the names of {file} were given to the folders in the order of their numbers: {order_shown}",
    )


def _check_single(file: str, classes: Sequence[str], matches: Sequence[list[int]]) -> None:
    for name, known in zip(classes, matches, strict=True):
        if len(known) > 1:
            raise DataError(
                f"{file} has the name {name!r} {len(known)} times (as {known[0] + 1} and {known[1] + 1}), "
                f"so it does not say which class the folder {name} is; call them differently"
            )


def _check_different(where: str, matched: Sequence[object], classes: Sequence[str]) -> None:
    first: dict[object, str] = {}
    for place, name in zip(matched, classes, strict=True):
        other = first.setdefault(place, name)
        if other != name:
            raise DataError(
                f"{where}: the folders {other!r} and {name!r} would be one class by their names; make them "
                f"one, or call them differently"
            )


def _without_ids(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split lines such as `n01440764 tench` into WordNet ids and names; no ids unless each line has one."""
    pairs = [_WITH_ID.fullmatch(name) for name in names]
    if not all(pairs):
        return (), names
    return tuple(pair[1] for pair in pairs if pair), tuple(pair[2] for pair in pairs if pair)


def _read_texts(file: str, what: str) -> tuple[str, ...]:
    """Read a file with one text per line, or a JSON list of texts."""
    if Path(file).suffix.lower() != ".json":
        return _read_lines(file, what)
    texts = validate(
        _LIST, parse_json(_read(file, what), file), f"{shown(file)}: wanted a JSON list of {what}"
    )
    return _kept([" ".join(text.split()) for text in texts], file, what)


def read_names(file: str) -> tuple[str, ...]:
    """Read class names: one per line, a JSON list, or a JSON object with the keys 0, 1, ...

    Raises:
        DataError: no such file, another layout, or names in quotation marks or with odd numbers.
    """
    if Path(file).suffix.lower() != ".json":
        return _without_numbers(_read_lines(file, "class names"), file)
    data = parse_json(_read(file, "class names"), file)
    where = f"{shown(file)}: wanted a JSON list of names"
    if isinstance(data, dict):
        numbered = validate(_NUMBERED, data, where)
        if sorted(numbered) != sorted(map(str, range(len(numbered)))):
            raise DataError(f"{where}, or an object with the keys 0 to {max(len(numbered) - 1, 0)}")
        entries = [numbered[str(number)] for number in range(len(numbered))]
        data = [entry if isinstance(entry, str) else " ".join(entry).replace("_", " ") for entry in entries]
    return _kept([" ".join(name.split()) for name in validate(_LIST, data, where)], file, "class names")


def _without_numbers(lines: tuple[str, ...], file: str) -> tuple[str, ...]:
    """Remove the numbers of a numbered list (`0 tench` or `1: tench`, as in label maps), if it is one.

    Raises:
        DataError: every line has a number, but they do not count up from 0 or 1.
    """
    pairs = numbered(lines)
    numbers = [number for number, _ in pairs]
    if not pairs:
        return lines
    if numbers not in (list(range(len(lines))), list(range(1, len(lines) + 1))):
        raise DataError(
            f"{shown(file)}: every line begins with a number, and these do not count up from 0 or 1 (line 1 "
            f"has {numbers[0]}, line 2 {numbers[1]}); leave the numbers out, one name a line, the first "
            f"class first"
        )
    return tuple(name for _, name in pairs)


def _read_lines(file: str, what: str) -> tuple[str, ...]:
    text = _read(file, what).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if lines and all(_QUOTED.fullmatch(line) for line in lines):
        raise DataError(
            f"{shown(file)}: its lines are in quotation marks (line 1 is {brief(lines[0])}), which would be "
            f"part of the {what}; write plain text, or a JSON list into a file that ends in .json"
        )
    return _kept(lines, file, what)


def _read(file: str, what: str) -> str:
    try:
        return read_text(Path(file), limit=_MOST_BYTES)
    except DataError as error:
        raise DataError(f"no such file of {what}, or none of text: {error}") from error


def _kept(lines: list[str], file: str, what: str) -> tuple[str, ...]:
    if not lines or not all(lines):
        raise DataError(f"{file}: holds no {what}{', or an empty one' if lines else ''}; wanted one a line")
    return tuple(composed(line) for line in lines)


# Letters: N images, M captions.

_Id = int | str


class _CaptionedImage(TypedDict):
    """An image of a captions file; further fields are ignored."""

    id: _Id
    file_name: Annotated[str, Field(min_length=1)]


class _Caption(TypedDict):
    """A caption."""

    image_id: _Id
    caption: str


class _CaptionsFile(TypedDict):
    """The fields of a captions file that are read."""

    images: list[_CaptionedImage]
    annotations: list[_Caption]


_FILE = TypeAdapter(_CaptionsFile)


class Captioned(NamedTuple):
    """Images and their captions."""

    source: ImageSource
    texts: tuple[str, ...]
    owners: Tensor  # [M] int64, the image of each caption, ascending


def open_captions(
    file: str, images: Path | None, *, limit: int | None, scenes: int, seed: int, memo: Path | None
) -> Captioned:
    """Open the captioned images of a COCO captions JSON, or of the generated world (`scenes`).

    Images without captions are omitted.

    Raises:
        DataError: an absent or invalid file, or images that are not in the folder.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no images; give 1 or more, or leave it out")
    if file == "scenes":
        count = min(scenes, limit or scenes)
        source = SceneImages("val", count=count, seed=seed)
        scenes_said = [scene_captions(render(index, split="val", seed=seed)) for index in range(count)]
        return _joined(source, scenes_said)
    assert images is not None, "the settings ask for both"
    names, texts_of = _read_captions(Path(file))
    if limit is not None and limit < len(names):
        chosen = [place * len(names) // limit for place in range(limit)]
        names, texts_of = [names[i] for i in chosen], [texts_of[i] for i in chosen]
    return _joined(StoredImages(_listing(Path(file), images, names), memo), texts_of)


def _joined(source: ImageSource, texts_of: Sequence[Sequence[str]]) -> Captioned:
    owners = torch.tensor([place for place, texts in enumerate(texts_of) for _ in texts])
    return Captioned(source, tuple(text for texts in texts_of for text in texts), owners)


def _read_captions(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the file names, and the captions of each, in the order of the file."""
    if not path.exists():
        raise DataError(f"{shown(path)}: no such captions file")
    data = validate(
        _FILE,
        parse_json(read_text(path, limit=MAX_DATA_BYTES), path),
        f"{shown(path)}: not COCO captions (images with id and file_name, annotations with image_id and "
        f"caption)",
    )
    names = _names(data["images"], path)
    texts_of: dict[int | str, list[str]] = {number: [] for number in names}
    for place, annotation in enumerate(data["annotations"]):
        text, number = annotation["caption"].strip(), annotation["image_id"]
        if number not in texts_of:
            raise DataError(
                f"{shown(path)}: not COCO captions: annotation {place} is of the image {number!r}, which the "
                f"file does not list"
            )
        if not text:
            raise DataError(f"{shown(path)}: annotation {place} has an empty caption; take it out")
        texts_of[number].append(text)
    kept = [number for number in names if texts_of[number]]
    if not kept:
        raise DataError(f"{shown(path)}: no image in it has a caption")
    return [names[number] for number in kept], [texts_of[number] for number in kept]


def _names(images: list[_CaptionedImage], path: Path) -> dict[int | str, str]:
    """Map the id of each image to its file name; both have to be unique."""
    names: dict[int | str, str] = {}
    files: set[str] = set()
    for place, image in enumerate(images):
        name = image["file_name"]
        if image["id"] in names or name in files:
            what = f"id {image['id']!r}" if image["id"] in names else f"file {shown(name)}"
            raise DataError(f"{shown(path)}: image {place} has the {what} of another; each needs its own")
        names[image["id"]] = name
        files.add(name)
    return names


def _listing(file: Path, images: Path, names: list[str]) -> Listing:
    paths = {name: _find(images, name) for name in names}
    absent = [name for name, path in paths.items() if path is None]
    if absent:
        raise DataError(
            f"{images}: {len(absent)} of the {len(names)} images of {file.name} are not there, "
            f"the first is {shown(absent[0][:200])}"
        )
    entries = [Entry(name, "", path, 0, path.stat().st_size) for name, path in paths.items() if path]
    return Listing(file.stem, str(images.resolve()), ("",), tuple(entries))


def _find(images: Path, name: str) -> Path | None:
    """Find the image with that name, in any Unicode form of its accents; None if it does not exist."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        try:
            if (images / form).is_file():
                return images / form
        except (OSError, ValueError):  # an invalid file name
            continue
    return None

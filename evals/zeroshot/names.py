"""What the classes are called, and the sentences that the names are put into."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from timm.data.imagenet_info import ImageNetInfo

from evals.core.data import ImageSource
from radio.errors import DataError, did_you_mean, require
from radio.scenes import TEMPLATES

# Letters: N pictures.

_WORDNET = re.compile(r"n\d{8}")


class Named(NamedTuple):
    """The classes that pictures are told apart by."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]  # [N], places in the names


def name_classes(source: ImageSource, wanted: str | None = None) -> Named:
    """The class names of a source, and its labels as places in them.

    Without `wanted` the names are those of the folders, `_` read as a space; folders that are called by
    WordNet ids get ImageNet's names. `imagenet` takes all of its 1000 names. A file has one name a line:
    names that the folders have too are matched, numbered classes are places in it, else the lines follow
    the folders in their order.

    Raises:
        DataError: classes without a name, or a file that does not fit them.
    """
    classes = source.classes
    if wanted is None:
        if all(_WORDNET.fullmatch(name) for name in classes):
            every, places = imagenet_names(), _synset_places(source)
            return Named(tuple(every[place] for place in places), source.labels)
        if all(name.isdecimal() for name in classes):
            raise DataError(
                f"{source.name}: its classes are numbers, not names; give --class-names imagenet, or a "
                f"file with one name a line"
            )
        return Named(tuple(_spoken(name) for name in classes), source.labels)
    names = imagenet_names() if wanted == "imagenet" else _read_lines(wanted, "class names")
    return Named(names, np.array(_places(source, names, wanted), dtype=np.int64)[source.labels])


def imagenet_names() -> tuple[str, ...]:
    """open_clip's names of ImageNet's 1000 classes (998 distinct), in the usual order.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    return tuple(require("open_clip", extra="zeroshot").IMAGENET_CLASSNAMES)


def read_templates(wanted: str | None, *, scenes: bool) -> tuple[str, ...]:
    """The templates of a set's name or a file, each with `{}` where the class name goes.

    Args:
        wanted: `openai` (80), `simple` (7), `scenes` (8) or a file; None takes `scenes` for the generated
            world and `openai` otherwise.

    Raises:
        DataError: no such file, or a line without `{}`.
        MissingExtraError: open_clip is not installed.
    """
    name = wanted or ("scenes" if scenes else "openai")
    if name == "scenes":
        return TEMPLATES
    if name in ("openai", "simple"):
        library = require("open_clip", extra="zeroshot")
        made: Sequence[Callable[[str], str]] = (
            library.OPENAI_IMAGENET_TEMPLATES if name == "openai" else library.SIMPLE_IMAGENET_TEMPLATES
        )
        return tuple(template("{}") for template in made)
    lines = _read_lines(name, "templates (or openai, simple, scenes)")
    for number, line in enumerate(lines, start=1):
        if line.count("{}") != 1:
            raise DataError(f"{name}: template {number} is {line!r}; wanted {{}} once, where the name goes")
    return lines


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _synset_places(source: ImageSource) -> list[int]:
    order = {synset: place for place, synset in enumerate(ImageNetInfo().label_names())}
    unknown = [name for name in source.classes if name not in order]
    if unknown:
        raise DataError(
            f"{source.name}: {unknown[0]} is none of ImageNet's 1000 classes ({len(unknown)} of "
            f"{len(source.classes)} are not); name the classes with --class-names FILE"
        )
    return [order[name] for name in source.classes]


def _places(source: ImageSource, names: tuple[str, ...], wanted: str) -> list[int]:
    """For each class of the source its place in the names."""
    classes = source.classes
    if wanted == "imagenet" and all(_WORDNET.fullmatch(name) for name in classes):
        return _synset_places(source)
    if all(name.isdecimal() for name in classes):
        high = max(int(name) for name in classes)
        if high >= len(names):
            raise DataError(
                f"{source.name} has a class {high}, and {wanted} names classes 0 to {len(names) - 1}"
            )
        return [int(name) for name in classes]
    order = {_spoken(name).lower(): place for place, name in reversed(list(enumerate(names)))}
    found = [order.get(_spoken(name).lower()) for name in classes]
    places = [place for place in found if place is not None]
    if len(places) == len(classes):
        return places
    if places or len(names) != len(classes):
        missing = classes[found.index(None)]
        hint = did_you_mean(_spoken(missing).lower(), order)
        raise DataError(
            f"{wanted} has {len(names)} names for the {len(classes)} classes of {source.name}, and none is "
            f"{missing!r}{hint}; give one line for each folder, in their order, or the folders' own names"
        )
    return list(range(len(classes)))


def _read_lines(file: str, what: str) -> tuple[str, ...]:
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such file of {what}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a text file ({error})") from error
    kept = tuple(line.strip() for line in lines if line.strip())
    if not kept:
        raise DataError(f"{file}: holds no {what}; wanted one a line")
    return kept

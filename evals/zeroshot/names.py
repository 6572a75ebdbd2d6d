"""Names of the classes, and the templates that the names are inserted into."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from radio.data import (
    ImageSource,
    are_wordnet_ids,
    composed,
    imagenet_numbers,
    numbered,
    order_by_number,
    shown_order,
)
from radio.errors import DataError, did_you_mean, require, shown
from radio.io import brief, parse_json, read_text, validate
from radio.scenes import TEMPLATES

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
        _check_different(source.name, [_matched(name) for name in classes], classes)
        return Named(tuple(composed(_spoken(name)) for name in classes), source.labels)
    names = imagenet_names() if file == "imagenet" else _read_names(file)
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
    return name.replace("_", " ")


def _matched(name: str) -> str:
    """Normalise a name for exact matching."""
    return composed(_spoken(name))


def _matched_loosely(name: str) -> str:
    """Normalise a name for matching without case, if no exact match exists."""
    return _matched(name).lower()


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
    exact, alike = _by_name(ids if by_id else spoken, _matched), _by_name(spoken, _matched_loosely)
    matches = [exact.get(_matched(name)) or alike.get(_matched_loosely(name), []) for name in classes]
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


def _read_names(file: str) -> tuple[str, ...]:
    if Path(file).suffix.lower() != ".json":
        return _without_numbers(_read_lines(file, "class names"), file)
    data = parse_json(_read(file, "class names"), file)
    where = f"{shown(file)}: wanted a JSON list of names"
    if isinstance(data, dict):
        numbered = validate(_NUMBERED, data, where)
        if sorted(numbered) != sorted(map(str, range(len(numbered)))):
            raise DataError(f"{where}, or an object with the keys 0 to {max(len(numbered) - 1, 0)}")
        entries = [numbered[str(number)] for number in range(len(numbered))]
        data = [entry if isinstance(entry, str) else _spoken(" ".join(entry)) for entry in entries]
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

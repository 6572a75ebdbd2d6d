"""Top-1 against several accepted labels per image (L. Beyer et al. 2020, ImageNet-ReaL)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field, TypeAdapter
from torch import Tensor

from evals.core.report import Metric
from evals.core.stats import proportion
from radio.data import (
    are_wordnet_ids,
    composed,
    imagenet_numbers,
    order_by_number,
    shown_order,
)
from radio.errors import DataError, shown
from radio.io import MAX_DATA_BYTES, parse_json, read_text, validate

# Letters: Q queries.

_NUMBER_AT_END = re.compile(r"(?<![0-9])0*([0-9]{1,9})$")

_Labels = list[Annotated[int, Field(ge=0, lt=2**31)]]
_Accepted = list[_Labels] | dict[str, _Labels]
_BY_NUMBER = TypeAdapter(list[_Labels])
_BY_NAME = TypeAdapter(dict[str, _Labels])
_ABSENT = -2  # a class that the bank does not have; -1 is no prediction


def real_accuracy(ranking: Tensor, accepted: Sequence[frozenset[int]]) -> Metric:
    """Compute top-1 against several accepted labels (L. Beyer et al. 2020), without images that have none.

    Args:
        ranking: [Q, 5] predictions.
        accepted: [Q], as `read_accepted` returns them.

    Raises:
        DataError: no image has a label.
    """
    judged = [(int(top), allowed) for top, allowed in zip(ranking[:, 0], accepted, strict=True) if allowed]
    if not judged:
        raise DataError("the file of accepted labels accepts none for any of the images")
    return proportion(sum(top in allowed for top, allowed in judged), len(judged))


def read_accepted(path: Path, keys: Sequence[str], classes: Sequence[str]) -> list[frozenset[int]]:
    """Read the accepted classes of each image, as indices into `classes`; -2 for classes outside them.

    Args:
        keys: [Q] names. If the file is a list, the number at the end of a name (`..._00000001.JPEG`) is the
            index from 1; if it is an object, the name without folders, with or without its extension, is the
            key.
        classes: of the bank. WordNet ids and numbers map to their class numbers in the file, other names to
            their indices.

    Raises:
        DataError: not such a file, an image without an entry or with the entry of another, classes whose
            numbers are ambiguous or unknown, or no label for any image.
    """
    accepted = _read(path)
    places = _places_by_number(classes, accepted, path)
    entries = [_entry(accepted, key, path) for key in keys]
    _check_own_entries(entries, keys, path)
    if not any(numbers for _, numbers in entries):
        raise DataError(f"{shown(path)}: accepts no label for any of the images")
    return [frozenset(places.get(number, _ABSENT) for number in numbers) for _, numbers in entries]


def _read(path: Path) -> _Accepted:
    if not path.exists():
        raise DataError(f"{shown(path)}: no such file of accepted labels")
    data = parse_json(read_text(path, limit=MAX_DATA_BYTES), path)
    where = f"{shown(path)}: wanted a list (or an object) of lists of class numbers"
    if not isinstance(data, dict):
        return validate(_BY_NUMBER, data, where)
    by_name = {composed(key): numbers for key, numbers in validate(_BY_NAME, data, where).items()}
    if len(by_name) < len(data):
        raise DataError(f"{shown(path)}: has names that differ only in how their accents are written")
    return by_name


def _places_by_number(classes: Sequence[str], accepted: _Accepted, path: Path) -> dict[int, int]:
    """Map the class numbers of the file to indices into `classes`."""
    if are_wordnet_ids(classes) and all(name in imagenet_numbers() for name in classes):
        return {imagenet_numbers()[name]: place for place, name in enumerate(classes)}
    if all(name.isdecimal() for name in classes):
        by_number = {int(name): place for place, name in enumerate(classes)}
        if len(by_number) < len(classes):
            raise DataError("the bank has several classes of one number, such as 1 and 01; make them one")
        return by_number
    entries = accepted.values() if isinstance(accepted, dict) else accepted
    most = max((number for numbers in entries for number in numbers), default=0)
    if most >= len(classes):
        raise DataError(
            f"the bank has {len(classes)} classes and {shown(path)} accepts {most}; class numbers need all "
            f"{most + 1} folders, or folders that are called by WordNet ids or numbers"
        )
    order = order_by_number(classes)
    if order != list(range(len(classes))):
        raise DataError(
            f"the bank's classes are {shown_order(classes, range(len(classes)))} by their letters and "
            f"{shown_order(classes, order)} by their numbers, so the class numbers of {shown(path)} may mean "
            f"either; call the folders by the numbers alone"
        )
    return {place: place for place in range(len(classes))}


def _entry(accepted: _Accepted, key: str, path: Path) -> tuple[str | int, list[int]]:
    """Return the key or number of an image's entry in the file, and the entry."""
    name = PurePosixPath(composed(key))
    if isinstance(accepted, dict):
        for candidate in (composed(key), name.name, name.stem):
            if candidate in accepted:
                return candidate, accepted[candidate]
        raise DataError(f"{path}: has no entry for {key}")
    number = _NUMBER_AT_END.search(name.stem)
    place = int(number.group(1)) if number else 0
    if not 1 <= place <= len(accepted):
        raise DataError(
            f"{path}: has {len(accepted)} entries, and {key} does not end in a number from 1 to that"
        )
    return place, accepted[place - 1]


def _check_own_entries(
    entries: Sequence[tuple[str | int, list[int]]], keys: Sequence[str], path: Path
) -> None:
    owners: dict[str | int, str] = {}
    for (entry, _), key in zip(entries, keys, strict=True):
        other = owners.setdefault(entry, key)
        if other != key:
            raise DataError(
                f"{path}: {other} and {key} would both have its entry {entry}; give each image a name or "
                f"number of its own"
            )

"""Class names and the numbers in them; an index in a sorted list is not the class's number elsewhere."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

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
    from timm.data.imagenet_info import ImageNetInfo  # timm takes a second to import

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
    found = [(int(pair[1]), pair[2]) for pair in pairs if pair]
    return found if len(found) == len(lines) > 1 else []


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

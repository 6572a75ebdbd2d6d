"""What classes are called, here and elsewhere: a place in a sorted list is no number of the world outside."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

_WORDNET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(\d{1,9})(?:[:,;.)]\s*|\s+)(\S.*)")
_MAX_DIGITS = 4000  # that Python takes for a number
_DIGITS = re.compile(r"([0-9]+)")


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether all are WordNet ids, as ImageNet's folders are called."""
    return all(_WORDNET.fullmatch(name) for name in names)


@cache
def imagenet_numbers() -> dict[str, int]:
    """Each of ImageNet's 1000 WordNet ids with its number from 0."""
    from timm.data.imagenet_info import ImageNetInfo  # timm is loaded where it is needed: it takes a second

    return {synset: number for number, synset in enumerate(ImageNetInfo().label_names())}


def composed(name: str) -> str:
    """The name with its accents written in one way (NFC)."""
    return unicodedata.normalize("NFC", name)


def one_form(name: str) -> str:
    """One form of names that are one: accents composed, and numbers without zeros before them."""
    return str(int(name)) if name.isdecimal() and len(name) < _MAX_DIGITS else composed(name)


def numbered(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Numbers and names of a list whose every line has both (`0 tench`, `1: tench`); empty for another."""
    pairs = [_NUMBERED.fullmatch(line) for line in lines]
    found = [(int(pair[1]), pair[2]) for pair in pairs if pair]
    return found if len(found) == len(lines) > 1 else []


def order_by_number(names: Sequence[str]) -> list[int]:
    """The places of names, in an order that takes the numbers in them by value: class_2 before class_10."""

    def key(place: int) -> list[tuple[int, str]]:
        parts = _DIGITS.split(names[place])  # texts and digits in turns
        digits = {i: parts[i].lstrip("0") for i in range(1, len(parts), 2)}
        return [(len(digits[i]), digits[i]) if i in digits else (0, part) for i, part in enumerate(parts)]

    return sorted(range(len(names)), key=key)


def shown_order(names: Sequence[str], places: Sequence[int]) -> str:
    """The first few of the names in an order, for a message."""
    return ", ".join(names[place] for place in places[:4]) + (", …" if len(places) > 4 else "")

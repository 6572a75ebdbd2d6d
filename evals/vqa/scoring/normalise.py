"""Normalisation of answers, so that `The  two dogs.` and `2 dogs` are equal.

Two conventions are in use. `official` is that of the VQA evaluation (S. Antol et al. 2015; visualqa.org).
TextVQA's scorers (`m4c`) lower first, drop every comma and question mark, separate a possessive, and then do
the same.
"""

from __future__ import annotations

import re
from functools import lru_cache

_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # both scorers pass re.UNICODE, which is 32, as the count
_PERIOD = re.compile(r"\.(?!\d)")  # not followed by a digit: decimals keep theirs

# For each ending, the words that the table combines with it: `hed` is in it; `shed` and `wed` are words.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_NOT_HAVE = "could had might should would"
_HAVE = "could might must not should they we what where who would you"
_WOULD = "he how it someone something there they where who you"
_WOULD_HAVE = "he it she somebody someone something there they we who you"
_WILL = "how it somebody someone something they what who why you"
_IS = "he how somebody someone that there what when where who why"
_ARE = "there they what why you"
_ALONE = {
    "maam": "ma'am",
    "oclock": "o'clock",
    "twas": "'twas",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",  # reversed by mistake, as in every scorer
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    found = dict(_ALONE)
    for stems, bare, right in (
        (_NOT, "nt", "n't"),
        (_HAVE, "ve", "'ve"),
        (_WOULD, "d", "'d"),
        (_WILL, "ll", "'ll"),
        (_IS, "s", "'s"),
        (_ARE, "re", "'re"),
    ):
        found |= {stem + bare: stem + right for stem in stems.split()}
    for stems, halves, right in (
        (_NOT_HAVE, ("nt've", "n'tve"), "n't've"),
        (_WOULD_HAVE, ("d've", "'dve"), "'d've"),
    ):
        found |= {stem + half: stem + right for stem in stems.split() for half in halves}
    return found


CONTRACTIONS: dict[str, str] = _contractions()
"""Contractions without apostrophes, and their correct spelling. The public table's capital entries (`Im`) are
omitted: words are lowered before the look-up, so those never apply."""


def clean(answer: str) -> str:
    """Put an answer on one line and strip it: the only normalisation of unanimous answers."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # most of millions of answers repeat
def official(answer: str) -> str:
    """Normalise an answer as the official VQA evaluation does where people disagree."""
    return _words(_punctuation(clean(answer)))


@lru_cache(maxsize=1 << 16)
def m4c(answer: str) -> str:
    """Normalise an answer as TextVQA's scorers do."""
    lowered = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuation(clean(lowered)))


def _punctuation(text: str) -> str:
    """Remove each punctuation mark that is next to a space, or all of them in a text with `1,000`.

    Other marks become a space; the first 32 full stops that are not before a digit are removed.
    """
    numbers = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        goes = numbers or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", found, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)

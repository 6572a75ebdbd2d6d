"""Answers brought to one form, so that `The  two dogs.` and `2 dogs` are the same.

Two conventions are in use. `official` is that of the VQA evaluation (S. Antol et al. 2015; visualqa.org).
TextVQA's scorers (`m4c`) lower first, drop every comma and question mark, set a possessive apart, and then do
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
_MOST_PERIODS = 32  # both scorers hand re.UNICODE, which is 32, over as the count
_PERIOD = re.compile(r"\.(?!\d)")  # one that no digit follows: decimals keep theirs

# For every ending, the words that the table completes with it: `hed` is there, `shed` and `wed` are words.
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
    "somebody'd": "somebodyd",  # the wrong way round, and so in every scorer
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
"""Contractions without their apostrophes, and how they are written. The public table's capital entries (`Im`)
are left out: words are lowered before they are looked up, so those never apply."""


def clean(answer: str) -> str:
    """An answer on one line without blanks around it: all that is done to unanimous answers."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # most of millions of answers are the same few
def official(answer: str) -> str:
    """An answer as the official VQA evaluation compares it, where people did not all say the same."""
    return _words(_punctuation(clean(answer)))


@lru_cache(maxsize=1 << 16)
def m4c(answer: str) -> str:
    """An answer as TextVQA's scorers compare it."""
    lowered = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuation(clean(lowered)))


def _punctuation(text: str) -> str:
    """A mark beside a blank goes, one between letters becomes a blank; with `1,000` in the text, all go."""
    numbers = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        goes = numbers or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", found, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)

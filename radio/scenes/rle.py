"""COCO's run-length masks: column by column, background first."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Compute the run lengths of a [H, W] mask in column order; the first is background, maybe 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate([[0], changes, [mask.size]])
    lengths: list[int] = np.diff(edges).tolist()
    return lengths


def compress(lengths: Sequence[int]) -> str:
    """Encode run lengths in COCO's text form.

    From the fourth run on, a run is written as its difference to the one two before; numbers are split into
    groups of five bits, lowest first, each a character from 48 on, whose sixth bit is set if another follows.
    """
    letters = []
    for place, length in enumerate(lengths):
        rest = length - (lengths[place - 2] if place > 2 else 0)
        more = True
        while more:
            group, rest = rest & 31, rest >> 5
            more = rest != (-1 if group & 16 else 0)
            letters.append(chr(48 + group + 32 * more))
    return "".join(letters)


def decompress(text: str) -> list[int]:
    """Read run lengths in COCO's text form, the inverse of `compress`.

    Raises:
        ValueError: an invalid text: other characters, a truncated number, or numbers of more than 30 bits.
    """
    groups = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if groups.size and (groups.min() < 0 or groups.max() > 63):
        raise ValueError("are no compressed text: a character is none of COCO's 64")
    last = groups & 32 == 0
    if groups.size and not last[-1]:
        raise ValueError("are a text that is cut")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    sizes = ends - starts + 1
    if ends.size and sizes.max() > 6:
        raise ValueError("hold a number of more than 30 bits")
    places = np.arange(groups.size) - np.repeat(starts, sizes)
    values = np.add.reduceat((groups & 31) << 5 * places, starts) if ends.size else ends
    values -= np.where(groups[ends] & 16, 1 << 5 * sizes, 0)
    # From the fourth run on, a difference to the one two before.
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    lengths: list[int] = values.tolist()
    return lengths

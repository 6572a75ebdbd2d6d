"""COCO's run-length masks: column by column, background first."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """The lengths of the runs of a [H, W] mask read down its columns; the first is background, maybe 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate([[0], changes, [mask.size]])
    lengths: list[int] = np.diff(edges).tolist()
    return lengths


def compress(lengths: Sequence[int]) -> str:
    """COCO's text form of run lengths.

    From the fourth run on, a run is written as its difference to the one two before; numbers are cut into
    groups of five bits, lowest first, each a character from 48 on, whose sixth bit says that another follows.
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

"""Which blocks of a ViTDet student attend globally."""

from __future__ import annotations

from typing import Literal

from ..errors import ConfigError

Schedule = Literal["quarters", "runs-of-5"]


def global_blocks(depth: int, schedule: Schedule = "quarters") -> tuple[int, ...]:
    """Indices of the global blocks; the others are windowed, and the last is always global.

    `quarters`: one at the end of every quarter of the depth (ViTDet: 7, 15, 23, 31 of 32).
    `runs-of-5`: one after every five windowed blocks (5, 11, 17, 23, 29, 31 of 32).

    Raises:
        ConfigError: the depth has no quarters, or quarters of one block, all of them global.
    """
    if schedule == "runs-of-5":
        return tuple(sorted({*range(5, depth, 6), depth - 1}))
    if depth < 8 or depth % 4:
        raise ConfigError(
            f"a depth of {depth} has no four quarters of two or more blocks; use a multiple of 4 from 8 on, "
            f"or runs-of-5"
        )
    return tuple(range(depth // 4 - 1, depth, depth // 4))

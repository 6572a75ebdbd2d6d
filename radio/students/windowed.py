"""The schedule of global attention blocks in a ViTDet student."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from ..errors import ConfigError

NumGlobal = Annotated[int, Interval(ge=1, le=1024)]
Schedule = Literal["quarters", "runs-of-5"] | NumGlobal
"""A name, or the number of parts of the depth that each end in a global block."""


def global_blocks(depth: int, schedule: Schedule = "quarters") -> tuple[int, ...]:
    """Compute the indices of the global blocks; the others are windowed, and the last is always global.

    `quarters`, or 4: one at the end of every quarter of the depth (ViTDet: 7, 15, 23, 31 of 32).
    Another number: as many parts. If they do not divide the depth, each has the quotient rounded down, and
    the remaining blocks end in an additional global one (5, 11, 17, 23, 26 of 27; AM-RADIO's rule).
    `runs-of-5`: one after every five windowed blocks (5, 11, 17, 23, 29, 31 of 32).

    Raises:
        ConfigError: parts of a single block, all of them global, or no parts.
    """
    parts = 4 if schedule == "quarters" else schedule
    period = 6 if isinstance(parts, str) else depth // max(parts, 1)
    if period < 2 or (isinstance(parts, int) and parts < 1):
        raise ConfigError(
            f"a depth of {depth} does not have {parts} parts of two or more blocks, some windowed; "
            f"take a schedule of 1 to {max(depth // 2, 1)} global blocks, or runs-of-5"
        )
    return tuple(sorted({*range(period - 1, depth, period), depth - 1}))

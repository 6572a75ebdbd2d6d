"""What the first rank does for all: its answer, and its error, reach every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from evals.core.dist import Group
from radio.errors import RadioError

T = TypeVar("T")


def on_leader(group: Group, work: Callable[[], T]) -> T:
    """Give every rank what `work` gives on the first; every rank calls it.

    Raises:
        RadioError, OSError: as the first rank's `work`, on every rank.
    """
    value: T | None = None
    problem: RadioError | OSError | None = None
    if group.leads:
        try:
            value = work()
        except (RadioError, OSError) as error:
            problem = error
    (value, problem), *_ = group.gather_objects((value, problem))
    if problem is not None:
        raise problem
    return value  # type: ignore[return-value]  # None only where T is

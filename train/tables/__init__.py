"""Tables of runs, each by one command: the paper's, at its own size or in small, and those of claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from radio.errors import ConfigError

from . import ablations, demonstrations, paper_size, small
from .layout import Size, TableLayout

_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
_MAKERS: Mapping[Size, Mapping[str, Callable[[], TableLayout]]] = {
    "small": {f"table{number}": getattr(small, f"table{number}") for number in _NUMBERS},
    "paper": {f"table{number}": getattr(paper_size, f"table{number}") for number in _NUMBERS},
}
_CLAIMS: Mapping[str, Callable[[], TableLayout]] = {
    "ablations": ablations.ablations,
    "mode-switching": demonstrations.mode_switching,
    "fixed-noise": demonstrations.fixed_noise,
    "teacher-scales": demonstrations.teacher_scales,
}

TABLES: tuple[str, ...] = tuple(_MAKERS["paper"])
ALL_TABLES = "tables"
"""Name of all the paper's tables together."""
CLAIMS: tuple[str, ...] = tuple(_CLAIMS)
"""Names of the tables of claims."""
NAMES = (*TABLES, ALL_TABLES, *CLAIMS)


def make_tables(name: str, size: Size) -> list[TableLayout]:
    """Return the table of a name, or all of `ALL_TABLES`; their runs score the tasks of their columns.

    Raises:
        ConfigError: a table of claims at the paper's size.
    """
    if name in _CLAIMS and size != "small":
        raise ConfigError(f"--size {size}: {name} has no numbers of a paper and is in small; leave it out")
    names = TABLES if name == ALL_TABLES else (name,)
    made = [_CLAIMS[each]() if each in _CLAIMS else _MAKERS[size][each]() for each in names]
    return [replace(table, base=replace(table.base, score=table.scored)) for table in made]


def describe_table(name: str) -> str:
    """Describe a table in a line."""
    if name == ALL_TABLES:
        return "All of the paper's; what several show is trained once."
    make = _CLAIMS.get(name) or _MAKERS["paper"][name]
    return (make.__doc__ or "").splitlines()[0]

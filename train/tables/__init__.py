"""The paper's tables made again, each by one command, at its own size or in small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from . import paper_size, small
from .layout import PaperTable, Size

_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
_MAKERS: Mapping[Size, Mapping[str, Callable[[], PaperTable]]] = {
    "small": {f"table{number}": getattr(small, f"table{number}") for number in _NUMBERS},
    "paper": {f"table{number}": getattr(paper_size, f"table{number}") for number in _NUMBERS},
}

TABLES: tuple[str, ...] = tuple(_MAKERS["paper"])
ALL_TABLES = "tables"
"""Name of all tables together."""


def make_tables(name: str, size: Size) -> list[PaperTable]:
    """Return the table of a name, or all of `ALL_TABLES`; their runs score the tasks of their columns."""
    made = [_MAKERS[size][each]() for each in (TABLES if name == ALL_TABLES else (name,))]
    return [replace(table, base=replace(table.base, score=table.tasks)) for table in made]


def describe_table(name: str) -> str:
    """Describe a table in a line."""
    if name == ALL_TABLES:
        return "All of them; what several show is trained once."
    return (_MAKERS["paper"][name].__doc__ or "").splitlines()[0]

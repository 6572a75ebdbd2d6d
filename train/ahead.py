"""Doing the next thing while this one is used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, cast

import torch

T = TypeVar("T")

_END = object()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items of an iterator, each made in a thread of its own while the one before is used.

    What goes wrong in the making is raised where the item would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as maker:
        coming = maker.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = maker.submit(next, items, _END)
            yield cast(T, item)


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Torch's operators on half as many threads, for two of them at a time.

    Small networks do not gain from a second thread inside an operator, but from a second operator.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)

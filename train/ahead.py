"""Prefetch the next items of an iterator in a background thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

_END = object()
_CPU = torch.device("cpu")


def prefetch(items: Iterator[T], device: torch.device = _CPU) -> Iterator[T]:
    """Prefetch the next item of an iterator in a separate thread while the current one is used.

    An error in producing an item is raised where the item would be yielded. On a GPU the thread uses a
    separate CUDA stream, so that its kernels overlap with the caller's.

    Args:
        items: the iterator to prefetch; tensors may be nested in tuples, lists and dicts.
        device: where the items are produced and used.
    """
    lane = _Stream(device) if device.type == "cuda" else None

    def make() -> tuple[object, torch.cuda.Event | None]:
        return (next(items, _END), None) if lane is None else lane.make(items)

    begin = None if lane is None else lane.enter
    with ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=begin) as maker:
        coming = maker.submit(make)
        while True:
            item, ready = coming.result()
            if item is _END:
                return
            coming = maker.submit(make)
            if lane is not None and ready is not None:
                lane.hand_over(item, ready)
            yield cast(T, item)


@final
class _Stream:
    """A CUDA stream for the prefetching thread, ordered with the caller's stream by events only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be being copied

    def enter(self) -> None:
        """Select the rank's device in the thread: a new thread always starts on GPU 0."""
        torch.cuda.set_device(self.device)

    def make(self, items: Iterator[Any]) -> tuple[object, torch.cuda.Event]:
        """Produce the next item and the event that marks it as ready."""
        with torch.cuda.stream(self.stream):
            item = next(items, _END)
            return item, self.stream.record_event()

    def hand_over(self, item: object, ready: torch.cuda.Event) -> None:
        """Make the caller's stream wait for the item on the device and keep its memory until it is used."""
        user = torch.cuda.current_stream(self.device)
        user.wait_event(ready)
        for leaf in tree_leaves(item):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(user)


@contextmanager
def limit_threads() -> Iterator[None]:
    """Halve the threads of each torch operator, so that two operators can run in parallel.

    Small networks gain from a second operator in parallel, not from a second thread inside one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)

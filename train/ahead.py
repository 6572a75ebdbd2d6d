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


def ahead(items: Iterator[T], device: torch.device = _CPU) -> Iterator[T]:
    """Prefetch the next item of an iterator in a thread of its own while the one before is used.

    What goes wrong in the making is raised where the item would have come. On a GPU the thread works on a
    stream of its own, so that its kernels run beside those of the caller.

    Args:
        items: what to prefetch; their tensors may be anywhere inside tuples, lists and dicts.
        device: where the items are made, and used.
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
    """A CUDA stream for the prefetching thread, ordered with the caller's by events alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # weights may still be on their way

    def enter(self) -> None:
        """Choose the device for the thread: a new thread starts on GPU 0, whatever the rank's own is."""
        torch.cuda.set_device(self.device)

    def make(self, items: Iterator[Any]) -> tuple[object, torch.cuda.Event]:
        """Make the next item, and an event that it is ready after."""
        with torch.cuda.stream(self.stream):
            item = next(items, _END)
            return item, self.stream.record_event()

    def hand_over(self, item: object, ready: torch.cuda.Event) -> None:
        """Let the caller's stream wait for the item on the device, and keep its memory until it is used."""
        user = torch.cuda.current_stream(self.device)
        user.wait_event(ready)
        for leaf in tree_leaves(item):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(user)


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

"""The ranks of one evaluation: started by torchrun, or one process that is a group of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """Who takes part. What crosses between ranks are small arrays on the CPU, so the backend is gloo."""

    rank: int = 0
    world: int = 1
    process_group: distributed.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            distributed.barrier(group=self.process_group)

    def gather(self, array: Tensor) -> Tensor:
        """[world, ...] from the arrays [...] of all ranks, of one shape and type, in order of rank."""
        if self.world == 1:
            return array.unsqueeze(0)
        parts = [torch.empty_like(array) for _ in range(self.world)]
        distributed.all_gather(parts, array.contiguous(), group=self.process_group)
        return torch.stack(parts)

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank; pickled on the way, between our own processes."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, value, group=self.process_group)
        return parts

    def sum(self, array: Tensor) -> Tensor:
        """The elementwise sum of the arrays of all ranks."""
        if self.world == 1:
            return array
        total = array.clone()
        distributed.all_reduce(total, group=self.process_group)
        return total


def current() -> Group:
    """The group of every rank that torch.distributed knows, or one of this process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Group()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if distributed.get_backend() == "gloo":
        return Group(rank, world)
    group = distributed.new_group(backend="gloo")
    assert isinstance(group, distributed.ProcessGroup)  # every rank is in it
    return Group(rank, world, group)


@contextmanager
def joined(backend: str = "gloo") -> Iterator[Group]:
    """The group that torchrun's environment describes, left again at the end; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ or distributed.is_initialized():
        yield current()
        return
    distributed.init_process_group(backend)
    try:
        yield current()
    finally:
        distributed.destroy_process_group()

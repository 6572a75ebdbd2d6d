"""The ranks of a run or an evaluation, started by torchrun, or a single process without a process group."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .errors import RadioError

T = TypeVar("T")

_WORD = "am-radio/word"
# Timeout of collectives: the leader may hash a terabyte or encode 80,000 prompts meanwhile. A rank that dies
# closes its connections, which ends the others at once.
_PATIENCE = timedelta(hours=24)
_MEETING = timedelta(minutes=10)  # until all ranks have started: imports from a slow disk take minutes


@dataclass(frozen=True, slots=True)
class Ranks:
    """The participating ranks. They exchange objects and small arrays over gloo, also beside NCCL."""

    rank: int = 0
    world: int = 1
    process_group: distributed.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world > 1:
            distributed.barrier(group=self.process_group)

    def channel(self) -> distributed.ProcessGroup | None:
        """Create a gloo group of the same ranks for another thread; None for a single rank.

        Every rank has to call this.
        """
        if self.world == 1:
            return None
        made = distributed.new_group(backend="gloo")
        assert isinstance(made, distributed.ProcessGroup)  # every rank is in it
        return made

    def gather(self, array: Tensor) -> Tensor:
        """Stack the arrays [...] of all ranks, of one shape and type, in order of rank: [world, ...]."""
        if self.world == 1:
            return array.unsqueeze(0)
        parts = [torch.empty_like(array) for _ in range(self.world)]
        distributed.all_gather(parts, array.contiguous(), group=self.process_group)
        return torch.stack(parts)

    def gather_objects(self, value: T) -> list[T]:
        """Gather the values of all ranks, in order of rank, pickled between our own processes."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, value, group=self.process_group)
        return parts

    def agree(self, error: RadioError | OSError | None) -> None:
        """Raise the first rank's error on every rank, so that none waits for one that has failed.

        Raises:
            RadioError, OSError: the error of a rank.
        """
        for found in self.gather_objects(error):
            if found is not None:
                raise found

    def on_leader(self, work: Callable[[], T]) -> T:
        """Run `work` on the leader while the others wait, and return its result on every rank.

        Raises:
            RadioError, OSError: the leader's error, on every rank.
        """
        value: T | None = None
        problem: RadioError | OSError | None = None
        if self.leads:
            try:
                value = work()
            except (RadioError, OSError) as error:
                problem = error
        (value, problem), *_ = self.gather_objects((value, problem))
        if problem is not None:
            raise problem
        return value  # type: ignore[return-value]  # None only where T is

    def sum(self, array: Tensor) -> Tensor:
        """Sum the arrays of all ranks elementwise."""
        if self.world == 1:
            return array
        total = array.clone()
        distributed.all_reduce(total, group=self.process_group)
        return total


def current() -> Ranks:
    """Return the group of all ranks of torch.distributed, or a group of this process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return Ranks(rank, world, _on_cpu(distributed.group.WORLD))


@lru_cache(maxsize=1)
def _on_cpu(default: object) -> distributed.ProcessGroup | None:
    """Return the gloo group of all ranks, created once per default group; None if the default has gloo."""
    if "gloo" in distributed.get_backend_config():
        return None
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, distributed.ProcessGroup)  # every rank is in it
    return group


def agree(store: Store, rank: int, world: int) -> str:
    """Agree on a random id among the ranks of this start, distinct from those of earlier starts.

    Ranks that torchrun restarts get its store with the contents that the previous ranks left, addresses
    included. Rank 0 draws the id and acknowledges each other rank through that rank's own random token:
    a rank whose token is acknowledged knows that the id is not an old one.

    Raises:
        TimeoutError: the first rank does not answer.
    """
    word, token = secrets.token_hex(8), secrets.token_hex(8)
    end = time.monotonic() + _MEETING.total_seconds()
    if rank == 0:
        store.set(_WORD, word)
        for other in range(1, world):
            asking = store.get(f"{_WORD}/{word}/{other}").decode()
            store.set(f"{_WORD}/{asking}", "")
        return word
    while time.monotonic() < end:
        word = bytes(store.get(_WORD)).decode()
        store.set(f"{_WORD}/{word}/{rank}", token)
        for _ in range(20):  # nobody acknowledges an old id
            if store.check([f"{_WORD}/{token}"]):
                return word
            time.sleep(0.05)
    raise TimeoutError(f"rank 0 gave no answer within {_MEETING}")


def _meet() -> tuple[Store, int, int]:
    """Connect to the ranks that torchrun's environment describes; return their store, rank and world size.

    Raises:
        RadioError: the environment describes no rank, or some ranks do not connect.
    """
    try:
        store, rank, world = next(rendezvous("env://", timeout=_MEETING))
        if not 0 <= rank < world:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}")
        return PrefixStore(agree(store, rank, world), store), rank, world
    except (RuntimeError, ValueError, OSError) as error:  # torch's network errors are RuntimeErrors
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = " ".join((str(error).splitlines() or [""])[0].split())
        raise RadioError(
            f"the ranks did not find one another at {address} ({reason}); start all of them by torchrun, "
            f"or one process without RANK, WORLD_SIZE and MASTER_ADDR in the environment"
        ) from error


@contextmanager
def joined(backend: str = "gloo") -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes until the end; a single process without it."""
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ or distributed.is_initialized():
        yield current()
        return
    store, rank, world = _meet()
    patience = None if backend == "nccl" else _PATIENCE  # NCCL's default detects a hanging rank
    distributed.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    try:
        yield current()
    finally:
        _on_cpu.cache_clear()
        distributed.destroy_process_group()

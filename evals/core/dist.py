"""The ranks of one evaluation: started by torchrun, or one process that is a group of its own."""

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

from radio.errors import RadioError

T = TypeVar("T")

_WORD = "am-radio/word"
# How long ranks wait for one another: the leader may hash a terabyte or encode 80,000 prompts meanwhile. One
# that dies closes its connections, which ends the others at once.
_PATIENCE = timedelta(hours=24)
_MEETING = timedelta(minutes=10)  # until all ranks have started: imports from a slow disk take minutes


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

    def channel(self) -> distributed.ProcessGroup | None:
        """A gloo group of the same ranks for another thread; every rank asks for it. None for one alone."""
        if self.world == 1:
            return None
        made = distributed.new_group(backend="gloo")
        assert isinstance(made, distributed.ProcessGroup)  # every rank is in it
        return made

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

    def agree(self, error: RadioError | OSError | None) -> None:
        """Raise on every rank what the first of them ran into, so that none waits for one that has gone.

        Raises:
            RadioError, OSError: some rank's error.
        """
        for found in self.gather_objects(error):
            if found is not None:
                raise found

    def on_leader(self, work: Callable[[], T]) -> T:
        """Do a piece of work on the leader while the others wait; what it gives and writes is for all.

        Raises:
            RadioError, OSError: the leader's, on every rank.
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
    return Group(rank, world, _on_cpu(distributed.group.WORLD))


@lru_cache(maxsize=1)
def _on_cpu(default: object) -> distributed.ProcessGroup | None:
    """The gloo group of all ranks: None where the default one is, else made once for each default group."""
    if "gloo" in distributed.get_backend_config():
        return None
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, distributed.ProcessGroup)  # every rank is in it
    return group


def agree(store: Store, rank: int, world: int) -> str:
    """A word that the ranks of this start agree on, and that those of no earlier start had.

    Ranks that torchrun starts again find its store as the ones before them left it, addresses and all. The
    first rank thinks the word up, and answers each of the others by a token of its own: who was answered
    knows that the word is not an old one.

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
        for _ in range(20):  # nobody answers to an old word
            if store.check([f"{_WORD}/{token}"]):
                return word
            time.sleep(0.05)
    raise TimeoutError(f"rank 0 gave no answer within {_MEETING}")


def _meet() -> tuple[Store, int, int]:
    """Find the other ranks that torchrun's environment describes: a store of all of them, rank and world.

    Raises:
        RadioError: the environment describes no rank, or some of them do not come.
    """
    try:
        store, rank, world = next(rendezvous("env://", timeout=_MEETING))
        if not 0 <= rank < world:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE {world}")
        return PrefixStore(agree(store, rank, world), store), rank, world
    except (RuntimeError, ValueError, OSError) as error:  # torch's errors of the network are RuntimeErrors
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = " ".join((str(error).splitlines() or [""])[0].split())
        raise RadioError(
            f"the ranks did not find one another at {address} ({reason}); start all of them by torchrun, "
            f"or one process without RANK, WORLD_SIZE and MASTER_ADDR in the environment"
        ) from error


@contextmanager
def joined(backend: str = "gloo") -> Iterator[Group]:
    """The group that torchrun's environment describes, left again at the end; alone without torchrun."""
    if "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ or distributed.is_initialized():
        yield current()
        return
    store, rank, world = _meet()
    patience = None if backend == "nccl" else _PATIENCE  # NCCL's own tells when a rank hangs
    distributed.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    try:
        yield current()
    finally:
        _on_cpu.cache_clear()
        distributed.destroy_process_group()

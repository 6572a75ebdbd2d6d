"""Ranks under torchrun, and the student behind DDP there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evals.core.dist import Group, current


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that torchrun's environment describes (NCCL on GPUs, gloo on CPUs), or one of its own."""
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        yield current()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield current()
    finally:
        distributed.destroy_process_group()


def wrap(module: nn.Module, group: Group, device: torch.device, *, compiled: bool) -> Any:
    """The module as it is called in a step: DDP when there are several ranks, compiled when asked for."""
    if group.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
    return torch.compile(module) if compiled else module

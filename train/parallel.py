"""Ranks under torchrun, and the student behind DDP there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evals.core.dist import Group, joined


def join(device: torch.device) -> AbstractContextManager[Group]:
    """The group that torchrun's environment describes: over NCCL on GPUs, gloo on CPUs; alone without it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return joined("nccl" if device.type == "cuda" else "gloo")


def wrap(module: nn.Module, group: Group, device: torch.device, *, compiled: bool) -> Any:
    """The module as it is called in a step: DDP when there are several ranks, compiled when asked for."""
    if group.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
    return torch.compile(module) if compiled else module

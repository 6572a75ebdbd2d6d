"""Activation checkpointing of blocks that may contain batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """Compute the block's output; recompute its activations in the backward pass.

    Running statistics are updated once, in the first pass. torch.compile ensures that itself: its second pass
    consists of the first one's operations without their side effects.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return compiled
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False, context_fn=partial(_contexts, block))
    return out


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _still(block)


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Freeze the running statistics; they stay tracked, as autograd would otherwise save other tensors."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        counted = norm.num_batches_tracked
        norm.momentum, norm.num_batches_tracked = 0.0, None if counted is None else counted.clone()
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted

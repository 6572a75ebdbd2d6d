"""LLaVA on several ranks: FSDP2 sharding, and a gradient for the projector in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

# Letters: B batch, S tokens of a sample, E width of the language model, D token width.


def shard(model: Any, device: torch.device, world: int) -> None:
    """Shard each block's weights over the ranks, and those outside the blocks as one more unit (FSDP2).

    Replaces accelerate's, which shards on GPUs only and silently replicates on CPUs.
    """
    mesh = init_device_mesh(device.type, (world,))
    model.to(device)
    blocks = set(model.model.language_model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def projector_in_every_batch(model: Any) -> Iterator[None]:
    """Give the projector a zero gradient instead of none in batches without images.

    DDP waits for every weight's gradient; its search for unused ones traverses the graph at every step.
    """
    projector: nn.Module = model.model.multi_modal_projector

    def add_nothing(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        width = model.config.vision_config.hidden_size
        blank = torch.zeros(1, width, device=embedded.device, dtype=embedded.dtype)
        nothing: Tensor = 0.0 * projector(blank).sum()
        return embedded + nothing  # [B, S, E]

    handle = model.get_input_embeddings().register_forward_hook(add_nothing)
    try:
        yield
    finally:
        handle.remove()

"""The moving average of a model's weights."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@final
class Average:
    """An exponential moving average of the weights on this rank.

    Args:
        model: its weights are averaged and are the start.
        decay: factor of the old average in every step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, fine: Tensor) -> None:
        """Move the average towards the current weights, unless `fine` ([] bool) is False: a skipped step."""
        averages = [_own(tensor) for tensor in self.tensors.values()]
        weights = [_own(weight.detach()) for weight in self._weights.values()]
        share = (1 - self.decay) * fine
        torch._foreach_lerp_(averages, weights, [share] * len(averages))


def _own(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

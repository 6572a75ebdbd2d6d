"""Memory of a run's teachers: drop text towers, and store matrices in the forward's precision."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from radio.teachers.frozen import Frozen
from radio.types import Teacher

from .config import TrainConfig

# Exactly these, no subclasses: autocast casts the weights that they pass to the kernel, and a subclass may
# compute with them first (as convolutions with standardised weights do).
_CAST = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)


def make_lean(teacher: Teacher, config: TrainConfig, *, half: bool) -> None:
    """Drop weights and precision that the run's forwards do not use; features stay bit-identical.

    Call it after computing the fingerprint. A teacher cache is made in float32, so its teachers stay in it.

    Args:
        teacher: loaded, or without weights (an outline).
        config: the run's settings.
        half: whether forwards run in bfloat16, under autocast.
    """
    if isinstance(teacher, Frozen):
        teacher.drop_text()
    if half and config.cache.folder is None and isinstance(teacher, nn.Module):
        halve(teacher)


def halve(module: nn.Module) -> None:
    """Store in bfloat16, in place, the weights that autocast would cast in each forward."""
    for part in module.modules():
        if type(part) in _CAST:
            for weight in part.parameters(recurse=False):
                weight.data = weight.data.to(torch.bfloat16)

"""What a run keeps of its teachers: no text tower, and no matrix in a precision that no forward uses."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from radio.teachers.frozen import Frozen
from radio.types import Teacher

from .config import TrainConfig

# Exactly these, no subclasses: autocast casts what they hand to the kernel, and a subclass may first compute
# with it (as convolutions of standardised weights do).
_CAST = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)


def make_lean(teacher: Teacher, config: TrainConfig, *, half: bool) -> None:
    """Drop what a forward of the run does not use; the features stay the same, bit for bit.

    Call it after the fingerprint was taken. A teacher cache is made in float32, so its teachers stay in it.

    Args:
        teacher: loaded, or an outline.
        config: the run's settings.
        half: whether forwards run in bfloat16, under autocast.
    """
    if isinstance(teacher, Frozen):
        teacher.drop_text()
    if half and config.cache.folder is None and isinstance(teacher, nn.Module):
        halve(teacher)


def halve(module: nn.Module) -> None:
    """Store in bfloat16 the weights that autocast would cast to it in each forward; in place."""
    for part in module.modules():
        if type(part) in _CAST:
            for weight in part.parameters(recurse=False):
                weight.data = weight.data.to(torch.bfloat16)

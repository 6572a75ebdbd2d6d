"""Read the weights file that a teacher's spec names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load_tensors
from ..errors import CheckpointError


def read_weights(spec: str, file: Path | None, anchors: Collection[str] = ()) -> dict[str, Tensor]:
    """Read the state dict in a teacher's weights file: floats as float32, trainers' wrappings removed.

    `spec` is the teacher's name with its family, as in `dinov2:vitb14`; `anchors` are weight names of its
    network, by which a prefix is recognised.

    Raises:
        CheckpointError: no file was given, it does not exist, or it is no weights file.
    """
    if file is None:
        raise CheckpointError(f"{spec} needs a weights file; name it as in {spec}@FILE")
    return {
        name: tensor.float() if torch.is_floating_point(tensor) else tensor
        for name, tensor in load_tensors(file, anchors).items()
    }


def refuse_file(spec: str, file: Path | None) -> None:
    """Check that no file was given for a teacher that includes its own weights.

    Raises:
        CheckpointError: one was given.
    """
    if file is not None:
        raise CheckpointError(f"{spec} brings its own weights; leave out @{file}")

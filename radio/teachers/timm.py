"""Frozen timm models with weights from a local file: `timm:NAME@FILE`."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..students.timm import TimmTrunk, check_name, make_network, mean_and_std
from ..types import Teacher
from . import families
from .base import Frozen


@families.register("timm")
def timm(name: str, file: Path | None, *, meta: bool = False) -> Teacher:
    """Load the timm model `name` with the weights in `file` (safetensors or a torch file).

    Its native size is the model's own; ViTs and CNNs accept every multiple of their patch or stride, others
    only that size (see `make_network`). `TimmTrunk` says what its summary and tokens are.

    Raises:
        ConfigError: timm has no such model, or it outputs no map.
        CheckpointError: no file was given, or it is absent or another model's.
    """
    check_name(name)
    if file is None and not meta:
        raise CheckpointError(
            f"timm:{name} needs a weights file, timm:{name}@FILE; without one it is an architecture, and is "
            f"taken untrained with --random-init"
        )
    network, native, fixed = make_network(name, file=None if meta else file, meta=meta)
    trunk = TimmTrunk(name, network)
    mean, std = mean_and_std(network)
    return Frozen(
        trunk=trunk,
        name=f"timm:{name}",
        mean=mean,
        std=std,
        native_size=(native, native),
        patch_size=trunk.stride,
        fixed_size=fixed,
        summary_dim=trunk.summary_dim,
        token_dim=trunk.token_dim,
        weights_file=file,
    )

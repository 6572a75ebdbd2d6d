"""Random weights that leave no part of a model without effect, and a file that would run code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture
def randomised() -> Callable[[nn.Module], Any]:
    """A function that redraws every weight: layer scales and norms about 1, not 1e-5 or exactly 1."""

    def redraw(module: nn.Module) -> nn.Module:
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                is_gain = name.endswith(("gamma", "lambda1")) or (
                    tensor.ndim == 1 and name.endswith("weight")
                )
                tensor.normal_(1.0 if is_gain else 0.0, 0.2 if is_gain else 0.05, generator=generator)
        return module.eval()

    return redraw


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[Path, Path]:
    """A weights file that makes another file when it is unpickled carelessly, and that other file."""
    trace = tmp_path / "it-ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    path = tmp_path / "bomb.pth"
    path.write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=2))
    return path, trace

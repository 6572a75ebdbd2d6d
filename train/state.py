"""What a run needs to go on exactly where it was: weights, optimiser, step, meters between two log lines."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from radio.config import write_bytes
from radio.errors import CheckpointError


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: str,
    meters: dict[str, Any],
) -> None:
    """Write the state after `step` steps, atomically; `settings` says which run it belongs to."""
    buffer = io.BytesIO()
    state = {"step": step, "settings": settings, "meters": meters}
    torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: str
) -> tuple[int, dict[str, Any]]:
    """Put a saved state into model and optimiser; the steps done and the meters.

    Raises:
        CheckpointError: a damaged file, or the state of a run with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole training state; start again with --restart") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise CheckpointError(f"{path}: a torch file, but no training state; start again with --restart")
    if state["settings"] != settings:
        raise CheckpointError(
            f"{path.parent}: holds a run with other settings; give another --out, or --restart to begin anew"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), dict(state["meters"])

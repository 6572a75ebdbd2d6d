"""Three frozen random teachers that cost nothing, under the family `tiny`.

Run as a script this is `radio-train` with that family known to it; TINY_DIES_AT=n kills the process, as
`kill -9` does, when a teacher is called for the n-th time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from radio.entry import train
from radio.teachers import families
from radio.teachers.base import Frozen
from radio.types import Features

# Letters: B batch, D token width, C summary width.


class Shape(NamedTuple):
    seed: int
    patch: int
    native: int
    token_dim: int
    summary_dim: int
    multiple: int | None


# Grids of 5 x 5, 4 x 4 and 6 x 6: none is that of a student with patch 12 at 96 px (8 x 8).
SHAPES = {
    "clip": Shape(1, 10, 50, 24, 12, 10),
    "dense": Shape(2, 16, 64, 16, 16, 16),
    "sam": Shape(3, 18, 108, 20, 20, None),
    "huge": Shape(4, 16, 64, 16, 16, 16),  # features beyond half precision
}


class Trunk(nn.Module):
    """One random convolution, and a projection of the mean token as the summary."""

    def __init__(self, shape: Shape, scale: float) -> None:
        super().__init__()
        self.scale, self.calls = scale, 0
        self.embed = nn.Conv2d(3, shape.token_dim, shape.patch, stride=shape.patch)
        self.project = nn.Linear(shape.token_dim, shape.summary_dim)

    def forward(self, images: Tensor) -> Features:
        self.calls += 1
        if self.calls == int(os.environ.get("TINY_DIES_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        plane = torch.tanh(3 * self.embed(images)) * self.scale
        tokens = plane.flatten(2).transpose(1, 2)
        return Features(self.project(tokens.mean(1)), tokens, (plane.shape[2], plane.shape[3]))


def tiny(name: str, file: Path | None) -> Frozen:
    """The teacher of this name; a trailing digit gives other weights, as in `clip2`."""
    member, version = name.rstrip("0123456789"), int(name.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
    shape = SHAPES[member]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed + 100 * version)
        trunk = Trunk(shape, 1e6 if member == "huge" else 1.0)
    return Frozen(
        trunk=trunk,
        name=f"tiny-{name}",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
        native_size=(shape.native, shape.native),
        patch_size=shape.multiple or shape.native,
        fixed_size=shape.multiple is None,
        summary_dim=shape.summary_dim,
        token_dim=shape.token_dim,
    )


def register() -> None:
    """Enter the family, once a process."""
    if "tiny" not in families:
        families.add("tiny", tiny)


if __name__ == "__main__":
    register()
    torch.set_num_threads(1)
    sys.exit(train())

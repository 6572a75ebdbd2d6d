"""What the students of this package share: a written-down shape, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from torch import nn

from ..checkpoint import digest
from ..config import to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What every family's config has."""

    name: str
    native: int = 224  # the image side in pixels that it was made for
    window: int | None = None  # side of an attention window in tokens
    recompute: bool = False  # activation checkpointing; changes no output


class Shaped(nn.Module):
    """A student that its `config` describes, but for the weights."""

    config: Shape

    @property
    def name(self) -> str:
        """The architecture's name."""
        return self.config.name

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of everything in the config that changes the output."""
        shape = to_plain(replace(self.config, recompute=False))
        return digest(self.state_dict(), json.dumps(shape, sort_keys=True))

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.fit(self.config.native, self.config.native)

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The nearest (height, width) in pixels that it takes."""
        raise NotImplementedError

"""The common base of this package's students: their configuration, and properties derived from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from torch import nn

from ..checkpoint import digest
from ..config import to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Settings common to the configs of all families."""

    name: str
    native: int = 224  # native image side in pixels
    window: int | None = None  # side of an attention window in tokens
    activation_checkpointing: bool = False  # does not change the output


class Shaped(nn.Module):
    """A student that its `config` describes completely, except for the weights."""

    config: Shape
    fixed_size = False

    @property
    def name(self) -> str:
        """Name of the architecture."""
        return self.config.name

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of everything in the config that changes the output."""
        shape = to_plain(replace(self.config, activation_checkpointing=False))
        return digest(self.state_dict(), json.dumps(shape, sort_keys=True))

    @property
    def native_size(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self.nearest_size(self.config.native, self.config.native)

    @property
    def window(self) -> int | None:
        """Side of the attention windows in tokens."""
        return self.config.window

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest accepted (height, width) in pixels."""
        raise NotImplementedError

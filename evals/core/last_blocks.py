"""The tokens of several blocks side by side, for probes that read more than the last one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from radio.errors import ConfigError
from radio.types import Backbone, Features

# Letters: B batch, T tokens, D token width, L blocks.


class LastBlocks(nn.Module):
    """A backbone whose tokens [B, T, L * D] are those of its last L blocks, the last one at the end.

    Each has passed the backbone's final norm. The summary is the last block's.

    Args:
        model: a backbone with `intermediate`.
        count: L.

    Raises:
        ConfigError: the backbone has no blocks, or fewer.
    """

    adaptors: Mapping[str, Any] = {}
    window = with_window = intermediate = text = sam = None
    num_blocks = summary_tokens = 0

    def __init__(self, model: Backbone, count: int) -> None:
        super().__init__()
        if model.num_blocks < count:
            has = f"has {model.num_blocks} blocks" if model.num_blocks else "is no sequence of equal blocks"
            raise ConfigError(f"{model.name} {has}, and --layers asks for the last {count}; lower it")
        self.model = model
        self.count = count
        self.name, self.metadata, self.weights_file = model.name, model.metadata, model.weights_file
        self.native_size, self.fixed_size, self.patch_size = (
            model.native_size,
            model.fixed_size,
            model.patch_size,
        )
        self.summary_dim, self.token_dim = model.summary_dim, count * model.token_dim

    @property
    def fingerprint(self) -> str:
        """The backbone's fingerprint and L."""
        return f"{self.model.fingerprint} last {self.count}"

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the nearest (height, width) that the backbone accepts."""
        return self.model.nearest_size(height, width)

    def to(self, *device_and_dtype: Any, **options: Any) -> Self:
        """Move the backbone, which need not be a module."""
        self.model = self.model.to(*device_and_dtype, **options)
        return self

    def forward(self, images: Tensor) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]."""
        assert self.model.intermediate is not None, "checked when it was made"
        first = self.model.num_blocks - self.count
        outputs = self.model.intermediate(images, range(first, self.model.num_blocks))
        last = outputs[-1]
        return Features(last.summary, torch.cat([each.tokens for each in outputs], dim=2), last.grid)

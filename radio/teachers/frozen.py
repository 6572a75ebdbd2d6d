"""One frozen encoder made a teacher: it normalises, refuses sizes it cannot take, and never learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, Self, final

import torch
from torch import Tensor, nn

from ..checkpoint import digest
from ..errors import SizeError
from ..types import Features, TextTower
from ..windows import nearest_multiple

# Letters: B batch, C summary width, T tokens, D token width, h w pixels.


class Trunk(Protocol):
    """An `nn.Module` that maps normalised pictures [B, 3, h, w] to features."""

    def __call__(self, images: Tensor) -> Features:
        """The features of normalised pictures."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight, as `nn.Module` gives them."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Every weight by name, as `nn.Module` gives them."""


@final
class Frozen(nn.Module):
    """A trunk behind the `Teacher` protocol: [B, 3, h, w] RGB in [0, 1] -> `Features`, without gradients.

    `multiple_of` is what both sides in pixels must be a multiple of; None takes the native size only.
    `variant` says in words what else decides the features (a resampling rule, a choice of layer), so
    that the fingerprint covers it. `text` is the text tower that shares the summary's space, `file` the
    weights file that it was read from.
    """

    def __init__(
        self,
        *,
        trunk: Trunk,
        name: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        native_size: tuple[int, int],
        multiple_of: int | None,
        summary_dim: int,
        token_dim: int,
        text: TextTower | None = None,
        variant: str = "",
        file: Path | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(trunk, nn.Module), "a trunk is an nn.Module"
        self.trunk: Trunk = trunk
        self._text = text  # a module too, as a rule: it moves along
        self.file = file
        self.name = name
        self.native_size = native_size
        self.multiple_of = multiple_of
        self.summary_dim = summary_dim
        self.token_dim = token_dim
        self._settings = f"{name} mean={mean} std={std} {variant}"
        self._fingerprints: dict[torch.dtype, str] = {}
        like = next(trunk.parameters(), torch.empty(0))
        for key, value in (("mean", mean), ("std", std)):
            buffer = torch.tensor(value, device=like.device, dtype=like.dtype).view(3, 1, 1)
            self.register_buffer(key, buffer, persistent=False)
        assert self.fit(*native_size) == native_size, f"{name}: its native size is none that it takes"
        self.requires_grad_(False)
        self.train(False)

    @property
    def text(self) -> TextTower | None:
        """The text tower that shares the summary's space; None where there is none."""
        return self._text

    def drop_text(self) -> None:
        """Forget the text tower, which nothing but texts needs."""
        self._text = None

    @property
    def fingerprint(self) -> str:
        """Hex hash of name, settings and the trunk's weights in their present type; computed once a type."""
        dtype = self.get_buffer("mean").dtype
        if dtype not in self._fingerprints:
            self._fingerprints[dtype] = digest(self.trunk.state_dict(), self._settings)
        return self._fingerprints[dtype]

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The accepted (height, width) in pixels nearest to the one asked for."""
        if self.multiple_of is None:
            return self.native_size
        return nearest_multiple(height, self.multiple_of), nearest_multiple(width, self.multiple_of)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a parent's `train()` must not wake dropout or batch norm."""
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        """The features of [B, 3, h, w] RGB in [0, 1], in the trunk's type; they carry no gradient.

        Raises:
            SizeError: no such batch, or a size that the encoder cannot take; names the nearest that it can.
        """
        self._check(images)
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        with torch.no_grad():
            features = self.trunk((images.to(mean.dtype) - mean) / std)
        assert features.summary.shape == (len(images), self.summary_dim)
        assert features.tokens.shape == (len(images), features.grid[0] * features.grid[1], self.token_dim)
        return features

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise SizeError(f"{self.name}: wanted pictures [B, 3, h, w], got {list(images.shape)}")
        height, width = images.shape[-2:]
        fitting = self.fit(height, width)
        if fitting != (height, width):
            raise SizeError(
                f"{self.name} cannot take {height}x{width} pixels (height x width); the nearest size "
                f"that it can is {fitting[0]}x{fitting[1]}: resize the pictures"
            )

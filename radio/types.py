"""The interfaces everything meets at: what an encoder returns, and who counts as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

# Letters: B batch, C summary width, T tokens, D token width, H W grid, N texts, E text width.


class Features(NamedTuple):
    """What any encoder returns. A NamedTuple, because torch.export refuses a bare dataclass."""

    summary: Tensor  # [B, C]
    tokens: Tensor  # [B, T, D], row-major over the grid
    grid: tuple[int, int]  # (H, W), H * W == T

    def map(self) -> Tensor:
        """The tokens as a picture: [B, D, H, W]."""
        plane: Tensor = self.tokens.transpose(1, 2).unflatten(2, self.grid)
        return plane


@runtime_checkable
class Backbone(Protocol):
    """A student, a teacher or a timm model: evaluators cannot tell them apart."""

    @property
    def name(self) -> str:
        """A short name for tables and reports."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of architecture and weights: the key of every cache."""

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the encoder was made for."""

    @property
    def summary_dim(self) -> int:
        """C, the width of the summary."""

    @property
    def token_dim(self) -> int:
        """D, the width of a spatial token."""

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The accepted (height, width) in pixels nearest to the one asked for."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same encoder, moved."""

    def eval(self) -> Self:
        """The same encoder in inference mode."""

    def __call__(self, images: Tensor) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; the encoder normalises by itself."""


class TextTower(Protocol):
    """The text side of a CLIP-like teacher, frozen."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of weights and tokenizer."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[N, E] text vectors, not normalised."""

    def project(self, summaries: Tensor) -> Tensor:
        """[B, C] summaries of the teacher in the texts' space [B, E]; CLIP's are there already."""


@runtime_checkable
class Teacher(Backbone, Protocol):
    """A frozen backbone that a student learns from."""

    @property
    def text(self) -> TextTower | None:
        """The text tower that shares the summary's space; None where there is none."""


@runtime_checkable
class Student(Backbone, Protocol):
    """A backbone that is trained. What it draws at random comes in from outside."""

    def draw(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """What one training forward draws at random (CPE crops), or None if it draws nothing."""

    def __call__(self, images: Tensor, drawn: Tensor | None = None) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; `drawn` as `draw` gave it, None when evaluating."""


@runtime_checkable
class Windowed(Protocol):
    """A backbone whose attention window can be chosen per use."""

    def with_window(self, side: int | None) -> Self:
        """The same backbone, sharing the weights, with windows of side x side tokens."""


class Adaptor(Protocol):
    """Carries student features into one teacher's space."""

    def __call__(self, features: Features, grid: tuple[int, int] | None = None) -> Features:
        """The features in the teacher's widths, on `grid` (None keeps the student's)."""

    def carry_summary(self, summaries: Tensor) -> Tensor:
        """[B, C] summaries of the student, alone, in the teacher's width."""

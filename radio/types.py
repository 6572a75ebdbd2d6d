"""The package's interfaces: encoders, their features, text towers and adaptors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .errors import ConfigError, did_you_mean

# Letters: B batch, C summary width, T tokens, D token width, H W grid, N texts, E text width.


class Features(NamedTuple):
    """The output of every encoder; a NamedTuple, because torch.export refuses a plain dataclass."""

    summary: Tensor  # [B, C]
    tokens: Tensor  # [B, T, D], row-major over the grid
    grid: tuple[int, int]  # (H, W), H * W == T

    def map(self) -> Tensor:
        """Reshape the tokens to a map [B, D, H, W]."""
        plane: Tensor = self.tokens.transpose(1, 2).unflatten(2, self.grid)
        return plane


class Positions(NamedTuple):
    """Evenly spaced positions along one axis of a grid; those of its tokens' centres are 0, 1, 2, ..."""

    first: Fraction
    step: Fraction
    length: int

    @property
    def are_tokens(self) -> bool:
        """Whether they are the centres of neighbouring tokens, so that nothing is interpolated."""
        return self.step == 1 and self.first.denominator == 1


class Sampling(NamedTuple):
    """Where to sample a grid of tokens: at every pair of a row's and a column's position."""

    rows: Positions
    columns: Positions

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of what is sampled."""
        return self.rows.length, self.columns.length


Resampling: TypeAlias = tuple[int, int] | Sampling  # the whole map on another grid (H, W), or a part of it


@runtime_checkable
class Encoder(Protocol):
    """A network that computes features of images: students' architectures, and every `Backbone`."""

    @property
    def name(self) -> str:
        """A short name for tables and reports."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of architecture and weights: the key of every cache."""

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the encoder was designed for."""

    @property
    def fixed_size(self) -> bool:
        """Whether the native size is the only one that it accepts."""

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a token."""

    @property
    def summary_dim(self) -> int:
        """C, the width of the summary."""

    @property
    def token_dim(self) -> int:
        """D, the width of a spatial token."""

    @property
    def summary_tokens(self) -> int:
        """Number of vectors of the tokens' space that the summary joins: its class tokens, or 1 where it is
        the tokens' mean; 0 where the tokens are in another space, such as a neck's, or it is unknown.
        """

    @property
    def window(self) -> int | None:
        """Side in tokens of the attention windows; None: global, or chosen by the size of the input."""

    @property
    def with_window(self) -> Callable[[int | None], Self] | None:
        """Method that returns the same encoder with windows of another side (None: as `window`'s None),
        sharing the weights. None for an encoder without windows.
        """

    @property
    def num_blocks(self) -> int:
        """Number of blocks whose outputs `intermediate` can return; 0 without `intermediate`."""

    @property
    def intermediate(self) -> Callable[[Tensor, Sequence[int]], list[Features]] | None:
        """Method that computes the features after each of the given blocks, all through the final norm.

        It takes images as a call does, and indices from 0 to `num_blocks` - 1 in any order; it raises a
        ConfigError for a block that does not exist. None for an encoder that is no sequence of equal blocks.
        """

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Compute the accepted (height, width) in pixels nearest to the requested one."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move the encoder and return it."""

    def eval(self) -> Self:
        """Set inference mode and return the encoder."""

    def __call__(self, images: Tensor) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; the encoder normalises them itself."""


@runtime_checkable
class Backbone(Encoder, Protocol):
    """A trained student, a teacher or a timm model: evaluators treat them alike.

    What only some of them have is empty or None in the others.
    """

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the checkpoint says about its teachers, data and settings; see `radio.checkpoint.Metadata`."""

    @property
    def adaptors(self) -> Mapping[str, Adaptor]:
        """The adaptors into teachers' spaces, by the teachers' names."""

    @property
    def text(self) -> TextTower | None:
        """Text tower that shares the summary's space."""

    @property
    def weights_file(self) -> Path | None:
        """The file that the weights were read from; None for shipped ones, and for those of a folder."""

    @property
    def sam(self) -> Any:
        """The `segment_anything.modeling.Sam` of a SAM's encoder, whose blocks may be absent; else None."""


class TextTower(Protocol):
    """The text side of a CLIP-like teacher, frozen."""

    @property
    def fingerprint(self) -> str:
        """Hex hash of weights and tokenizer."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as vectors [N, E], not normalised."""

    @property
    def takes_tokens(self) -> bool:
        """Whether the teacher's tokens may be compared with texts as its summaries are; usually they lie
        before a projection or a pooling, and may not.
        """

    def project(self, summaries: Tensor) -> Tensor:
        """Project the teacher's summaries [B, C] to the texts' space [B, E]; CLIP's are unchanged."""


class Adaptor(Protocol):
    """A module that maps student features into one teacher's space."""

    def __call__(self, features: Features, grid: Resampling | None = None) -> Features:
        """Map features to the teacher's widths, on `grid` (None keeps the student's)."""

    def adapt_summary(self, summaries: Tensor) -> Tensor:
        """Map only the student's summaries [B, C] to the teacher's width."""


def find_adaptor(model: Backbone | AdaptingModel, name: str) -> Adaptor:
    """Return a model's adaptor into the space of teacher `name`.

    Raises:
        ConfigError: it has none of that name; lists the existing ones.
    """
    if name not in model.adaptors:
        hint = did_you_mean(name, model.adaptors) or f"; it has {', '.join(model.adaptors) or 'none'}"
        raise ConfigError(f"{model.name} has no adaptor {name!r}{hint}")
    return model.adaptors[name]


def with_global_attention(model: Backbone) -> Backbone | None:
    """Return a ViT with global attention in every block, sharing the weights; None for any other model."""
    if model.with_window is None:
        return None
    twin = model.with_window(None)
    # A model that chooses its window by the input's size, as E-RADIO does, cannot take a single token.
    return twin if twin.nearest_size(1, 1) == (model.patch_size, model.patch_size) else None


class AdaptingModel:
    """The part of a model that uses its `adaptors` by name."""

    adaptors: Mapping[str, Adaptor]
    name: str

    def adapt(self, name: str, features: Features, grid: Resampling | None = None) -> Features:
        """Map features into teacher `name`'s space, on `grid` (None keeps the adaptor's own).

        Raises:
            ConfigError: no adaptor of that name exists; lists the existing ones.
        """
        return find_adaptor(self, name)(features, grid)

    def adapt_summary(self, name: str, summaries: Tensor) -> Tensor:
        """Map only summaries [B, C] into teacher `name`'s space, for cached summaries.

        Raises:
            ConfigError: as `adapt`.
        """
        return find_adaptor(self, name).adapt_summary(summaries)


@runtime_checkable
class Teacher(Backbone, Protocol):
    """A frozen backbone that a student learns from."""


@runtime_checkable
class Student(Encoder, Protocol):
    """An encoder that is trained; its random values are passed in from outside."""

    def sample_crops(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Draw the random values of one training forward (CPE crops); None if it draws nothing."""

    def __call__(self, images: Tensor, crops: Tensor | None = None) -> Features:
        """Encode [B, 3, h, w] RGB in [0, 1]; `crops` come from `sample_crops`, None in evaluation."""

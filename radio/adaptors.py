"""Adaptors: small heads that map student features into one teacher's space (paper §3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval
from torch import Tensor, nn

from .errors import ConfigError, did_you_mean
from .nn.vit import NORM_EPS
from .ops import resize_features
from .types import Adaptor, Backbone, Features

# Letters: B batch, C summary width, T tokens, D token width, H W grid.


Width = Annotated[int, Interval(ge=1, le=2**20)]  # of a feature vector
Slot = Annotated[int, Interval(ge=0, lt=1024)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorConfig:
    """The shape of the adaptor for one teacher."""

    name: str
    summary_dim: Width  # the teacher's C
    token_dim: Width  # the teacher's D
    hidden: Width | None = None  # hidden width of both heads; None = the student's token width
    slot: Slot | None = None  # class token it reads if each teacher has one; None = the whole summary
    resample: Literal["before", "after"] = (
        "before"  # or after the head; bilinear to the teacher's grid (our choice)
    )


class Head(nn.Module):
    """Linear, LayerNorm, GELU, Linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden, eps=NORM_EPS), nn.GELU(), nn.Linear(hidden, out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., out]."""
        y: Tensor = self.layers(x)
        return y


class MLPAdaptor(nn.Module):
    """One head for the summary and one for the tokens.

    Args:
        config: the teacher's widths and how to resample.
        summary_dim: C of the student.
        token_dim: D of the student.

    Raises:
        ConfigError: the summary has no class token at that slot.
    """

    def __init__(self, config: AdaptorConfig, summary_dim: int, token_dim: int) -> None:
        super().__init__()
        slots = summary_dim // token_dim
        if config.slot is not None and not 0 <= config.slot < slots:
            raise ConfigError(
                f"adaptor {config.name!r} reads class token {config.slot}, and the student has {slots}; "
                f"give the student one per teacher and count from 0"
            )
        self.config = config
        self.slot_width = token_dim
        hidden = config.hidden or token_dim
        self.summary = Head(summary_dim if config.slot is None else token_dim, hidden, config.summary_dim)
        self.spatial = Head(token_dim, hidden, config.token_dim)

    def forward(self, features: Features, grid: tuple[int, int] | None = None) -> Features:
        """Map features to the teacher's widths; resample tokens to `grid` (None keeps the student's)."""
        to = features.grid if grid is None else grid
        placed = resize_features(features, to) if self.config.resample == "before" else features
        mapped = Features(self.adapt_summary(features.summary), self.spatial(placed.tokens), placed.grid)
        return resize_features(mapped, to)

    def adapt_summary(self, summaries: Tensor) -> Tensor:
        """Map the student's summaries [B, C] to the teacher's [B, C]."""
        if self.config.slot is not None:
            start = self.config.slot * self.slot_width
            summaries = summaries[:, start : start + self.slot_width]
        carried: Tensor = self.summary(summaries)
        return carried


def find_adaptor(model: Backbone, name: str) -> Adaptor:
    """Return a model's adaptor into the space of teacher `name`.

    Raises:
        ConfigError: it has none of that name; lists the existing ones.
    """
    if name not in model.adaptors:
        hint = did_you_mean(name, model.adaptors) or f"; it has {', '.join(model.adaptors) or 'none'}"
        raise ConfigError(f"{model.name} has no adaptor {name!r}{hint}")
    return model.adaptors[name]

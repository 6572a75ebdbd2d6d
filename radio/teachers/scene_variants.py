"""Variants of the scenes teachers with one known flaw, to measure whether a loss is proof against it.

- `scenes:clip-scaled`, `scenes:sam-scaled`: tokens as small as DFN CLIP's and as large as SAM-H's, which
  deviate by 0.0286 and 5.4688 over all entries (PHI-S, table 7): a factor of 191, whose square is 36,600.
- `scenes:dense-noisy`: a fixed pattern on the token grid, the same for every image, as the border holes of
  SigLIP2 and the seams of SAM's windows are (C-RADIOv4, §2); `scenes:dense` is its clean twin.

All else (summaries of class tokens, text tower, SAM's decoder) is the plain teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..types import Features

# Letters: B batch, T tokens, D token width, H W grid, s side of the pattern.

# Deviations of all entries of the plain teachers' tokens, over 960 scenes (split train, seed 1).
_CLIP, _SAM = 1.2191, 2.0726
CLIP_FACTOR = 0.0286 / _CLIP
SAM_FACTOR = 5.4688 / _SAM

_DENSE = 0.9799  # of the dense teacher's tokens from their mean token: sqrt(tr(covariance) / D), likewise
STRENGTH = 0.5  # deviation of the pattern as a share of that (ours): a fifth of the noisy tokens' variance
_SEED = 0
_SIDE, _WIDTH = 9, 128  # the dense teacher's own grid and width


def fixed_pattern() -> Tensor:
    """Draw the pattern of `scenes:dense-noisy`: [s, s, D], normal, of mean 0 over the positions.

    A constant over all positions would be no pattern: no shift could tell it from the features.
    """
    noise = torch.randn(_SIDE, _SIDE, _WIDTH, generator=torch.Generator().manual_seed(_SEED))
    return STRENGTH * _DENSE * (noise - noise.mean(dim=(0, 1)))


@final
class ChangedTrunk(nn.Module):
    """A trunk whose features a module changes, after every block."""

    def __init__(self, trunk: Any, change: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.change = change
        self.num_blocks: int = trunk.num_blocks

    def forward(self, images: Tensor) -> Features:
        """Compute the changed features of normalised images [B, 3, h, w]."""
        changed: Features = self.change(self.trunk(images))
        return changed

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute the changed features after each of the given blocks."""
        return [self.change(features) for features in self.trunk.intermediate(images, blocks)]


@final
class Scale(nn.Module):
    """Features with tokens times a factor, and summaries too where they are means of tokens."""

    def __init__(self, factor: float, *, summary: bool) -> None:
        super().__init__()
        self.factor = nn.Buffer(torch.tensor(factor))  # a buffer, so that the fingerprint covers it
        self.summary = summary

    def forward(self, features: Features) -> Features:
        """Scale features of any sizes."""
        summary = features.summary * self.factor if self.summary else features.summary
        return features._replace(summary=summary, tokens=features.tokens * self.factor)


@final
class AddPattern(nn.Module):
    """Features with a pattern [s, s, D] added to the tokens; a larger grid repeats it, as windows would."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.pattern = nn.Buffer(pattern)

    def forward(self, features: Features) -> Features:
        """Add the pattern to features of tokens [B, H*W, D]."""
        (h, w), s = features.grid, len(self.pattern)
        repeated = self.pattern.repeat(-(-h // s), -(-w // s), 1)[:h, :w]
        return features._replace(tokens=features.tokens + repeated.flatten(0, 1))


class Variant(NamedTuple):
    """A plain teacher, and what its features become."""

    plain: str  # name of the member
    change: Callable[[], nn.Module]


VARIANTS: Mapping[str, Variant] = {
    "clip-scaled": Variant("clip", partial(Scale, CLIP_FACTOR, summary=False)),
    "sam-scaled": Variant("sam", partial(Scale, SAM_FACTOR, summary=True)),
    "dense-noisy": Variant("dense", lambda: AddPattern(fixed_pattern())),
}
"""The variants by the member's name."""


def undo_scale(sam: Any) -> Any:
    """Let SAM's neck read tokens that are `SAM_FACTOR` times as large; return the same SAM.

    The neck begins with a projection without bias, so that dividing its weights is exact.
    """
    with torch.no_grad():
        sam.image_encoder.neck[0].weight.div_(SAM_FACTOR)
    return sam

"""The first three principal components of tokens, and tokens as colors along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from radio.errors import DataError

# Letters: P tokens of all images, D token width, C components.

NUM_COMPONENTS = 3
_EDGE = 0.01  # share of the values that is clipped on either side
_ROUNDING = 1e-6  # of the widest component's range: a smaller one counts as constant


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """A basis of principal components, and the range of coordinates that the colors cover."""

    mean: Tensor  # [D]
    axes: Tensor  # [C, D], of unit length
    low: Tensor  # [C]
    high: Tensor  # [C]

    @classmethod
    def fit(cls, tokens: Tensor) -> Self:
        """Fit the first three components to tokens [P, D], in float64.

        The sign of an axis is the one that makes its largest entry positive. Where the tokens have fewer
        than three dimensions, the other components are 0.

        Raises:
            DataError: values that are not finite.
        """
        if not torch.isfinite(tokens).all():
            raise DataError("the tokens hold values that are not finite, which have no components")
        points = tokens.double()
        mean = points.mean(dim=0)
        centred = points - mean
        vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending
        kept = min(NUM_COMPONENTS, len(mean))
        axes = centred.new_zeros(NUM_COMPONENTS, len(mean))
        axes[:kept] = vectors.T.flip(0)[:kept]
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        axes *= torch.where(largest < 0, -1.0, 1.0)
        coordinates = centred @ axes.T
        low, high = (coordinates.quantile(q, dim=0) for q in (_EDGE, 1 - _EDGE))
        return cls(mean=mean, axes=axes, low=low, high=high)

    def coordinates(self, tokens: Tensor) -> Tensor:
        """Project tokens [..., D] onto the axes: [..., C]."""
        return (tokens.double() - self.mean) @ self.axes.T

    def explained(self, tokens: Tensor) -> float:
        """Compute the share of the variance of tokens [..., D] along the axes; 0 where they do not vary."""
        centred = tokens.double().flatten(0, -2)
        centred = centred - centred.mean(dim=0)
        total = float(centred.square().sum())
        return float((centred @ self.axes.T).square().sum()) / total if total else 0.0

    def colors(self, tokens: Tensor) -> Tensor:
        """Turn tokens [..., D] into colors [..., C] in [0, 1]; grey where a component does not vary."""
        span = self.high - self.low
        varies = span > _ROUNDING * span.max()
        shown = (self.coordinates(tokens) - self.low) / torch.where(varies, span, 1.0)
        return torch.where(varies, shown, 0.5).clamp(0, 1)

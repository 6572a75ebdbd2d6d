"""The parts of released RADIO models that our own students do not have: their heads.

Parameters have the names of the released files, without the prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import resize_features
from ..types import Features, Resampling
from .phi_s import FeatureNormaliser
from .vit import Block

# Letters: B batch, T tokens, D width, K class tokens in the summary, H W grid, f up-sampling factor.

_ATTENTION_HEADS = 16  # of the blocks in a spatial head


def _step(width: int, out: int) -> nn.Sequential:
    """LayerNorm, GELU, Linear."""
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, out))


@final
class HeadV1(nn.Module):
    """Linear, LayerNorm, ReLU, Linear: the heads of the first release."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., out]."""
        y: Tensor = self.fc2(F.relu(self.norm(self.fc1(x))))
        return y


@final
class HeadV2(nn.Module):
    """Linear, residual steps, and a last step, each of LayerNorm, GELU and Linear.

    Args:
        pre_norm: width of a LayerNorm and GELU before all; None leaves them out.
    """

    def __init__(self, width: int, hidden: int, out: int, *, steps: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = nn.Sequential(nn.LayerNorm(width), nn.GELU()) if pre_norm else nn.Identity()
        self.fc1 = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(_step(hidden, hidden) for _ in range(steps))
        self.final = _step(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., out]."""
        x = self.fc1(self.pre_norm(x))
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.final(x)
        return y


@final
class AttentionHead(nn.Module):
    """Transformer blocks over all tokens of an image, then a head of the second kind (C-RADIOv4)."""

    def __init__(self, width: int, hidden: int, depth: int, mlp: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, _ATTENTION_HEADS, hidden, layer_scale=1.0) for _ in range(depth)
        )
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, out]."""
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.mlp(x)
        return y


def build_head(shapes: Mapping[str, torch.Size]) -> nn.Module | None:
    """Build the head whose parameters have these names and shapes; None if no kind of head has them.

    The result may lack parameters that are in `shapes`, or have others: compare before loading.
    """
    first = shapes.get("mlp.fc1.weight", shapes.get("fc1.weight"))
    if first is None or len(first) != 2 or any(0 in shape for shape in shapes.values()):
        return None
    hidden, width = first
    if "blocks.0.attn.qkv.weight" in shapes:
        inner = {
            name.removeprefix("mlp."): shape for name, shape in shapes.items() if name.startswith("mlp.")
        }
        mlp = None if "blocks.0.attn.qkv.weight" in inner else build_head(inner)
        wide = shapes.get("blocks.0.mlp.fc1.weight", first)
        if mlp is None or len(wide) != 2 or width % _ATTENTION_HEADS:
            return None
        return AttentionHead(width, wide[0], _count(shapes), mlp)
    if last := shapes.get("fc2.weight"):
        return HeadV1(width, hidden, last[0])
    if last := shapes.get("final.2.weight"):
        pre_norm = "pre_norm.0.weight" in shapes
        return HeadV2(width, hidden, last[0], steps=_count(shapes), pre_norm=pre_norm)
    return None


def _count(shapes: Mapping[str, torch.Size]) -> int:
    """Count the blocks from 0 on without a gap."""
    indices = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return next(n for n in range(len(indices) + 1) if str(n) not in indices)


@final
class ReleasedAdaptor(nn.Module):
    """The heads of a released model for one of its teachers.

    Args:
        summary: head of one class token [B, D]; None if the release has none.
        spatial: head of the tokens [B, T, D]; None if the release has none.
        position: of the class token among those in the summary; None if it is not among them.
        width: D.
        upsample: f; the spatial head gives f * f tokens for each one, row by row.
        normaliser: what the backbone's tokens have passed, and this adaptor undoes; None if nothing.
    """

    def __init__(
        self,
        summary: nn.Module | None,
        spatial: nn.Module | None,
        *,
        position: int | None,
        width: int,
        upsample: int = 1,
        normaliser: FeatureNormaliser | None = None,
    ) -> None:
        super().__init__()
        self.summary, self.spatial = summary, spatial
        self.position, self.width, self.upsample = position, width, upsample
        self._normaliser = (normaliser,)  # in a tuple: it belongs to the trunk

    def forward(self, features: Features, grid: Resampling | None = None) -> Features:
        """Map features to the teacher's widths, on `grid` (None keeps the spatial head's).

        The summary of a teacher whose class token is not in the backbone's summary is the mean of its tokens,
        as SAM's.

        Raises:
            ConfigError: the release has no spatial head for this teacher, or one that cannot up-sample by f.
        """
        if self.spatial is None:
            raise ConfigError("this release has no spatial head for that teacher, only one for its summary")
        normaliser = self._normaliser[0]
        tokens = features.tokens if normaliser is None else normaliser.invert(features.tokens)
        mapped, f = self.spatial(tokens), self.upsample
        h, w = features.grid
        if f > 1:
            if mapped.shape[-1] % (f * f):
                raise ConfigError(
                    f"the {mapped.shape[-1]} numbers of a token of this head are no {f} x {f} tokens, as its "
                    f"release says; is the file damaged?"
                )
            parts = mapped.view(len(mapped), h, w, f, f, -1).transpose(2, 3)
            mapped = parts.reshape(len(mapped), h * f * w * f, -1)
        has_summary = self.summary is not None and self.position is not None
        summary = self.adapt_summary(features.summary) if has_summary else mapped.mean(dim=1)
        own = Features(summary, mapped, (h * f, w * f))
        return own if grid is None else resize_features(own, grid)

    def adapt_summary(self, summaries: Tensor) -> Tensor:
        """Map the backbone's summaries [B, K * D] to the teacher's.

        Raises:
            ConfigError: the teacher's class token is not in the summary, or the release has no head for it.
        """
        if self.summary is None or self.position is None:
            raise ConfigError(
                "this release's summary does not hold the class token of that teacher; choose another head"
            )
        start = self.position * self.width
        carried: Tensor = self.summary(summaries[:, start : start + self.width])
        return carried

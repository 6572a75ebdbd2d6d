"""Attention inside windows whose side may change between calls, at full or half resolution."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import from_windows, to_windows
from .vit import MLP, NORM_EPS, Attention

# Letters: B batch, D width, H W grid, s window side, M windows of all images, h heads.

_HIDDEN = 512  # hidden width of the position MLP
_UNIT = 8.0  # distance in tokens that the logarithm maps to about 1


class PositionBias(nn.Module):
    """A bias for every head and pair of tokens, from an MLP over their distance.

    Distances are in tokens, spaced logarithmically (Swin V2, eq. 4), so that windows larger than those of
    training need little extrapolation.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, _HIDDEN)
        self.fc2 = nn.Linear(_HIDDEN, heads, bias=False)
        self._kept: tuple[tuple[object, ...], Tensor] | None = None  # cached bias: its key, its value

    def forward(self, side: int) -> Tensor:
        """Compute the bias [1, h, s*s, s*s] (query token, key token) for a window of side s.

        Outside of training it is cached: it depends only on the side and the weights.
        """
        kind = self.fc1.weight.device.type
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or kind == "meta":
            return self._make(side)
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        made_of = (side, cast, *(_state(weight) for weight in self.parameters()))
        if self._kept is None or self._kept[0] != made_of:
            bias = self._make(side)
            if type(bias) is not Tensor:  # a tracer's tensor, without values
                return bias
            self._kept = made_of, bias
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        """Switch the mode and drop the cached bias."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the cached bias."""
        return {**self.__dict__, "_kept": None}

    def _make(self, side: int) -> Tensor:
        device, reach = self.fc1.weight.device, 2 * side - 1
        apart = torch.arange(1 - side, side, device=device).to(self.fc1.weight.dtype)
        spaced = apart.sign() * torch.log2(1 + apart.abs()) / math.log2(_UNIT)
        offsets = torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), dim=-1)
        table = self.fc2(F.relu(self.fc1(offsets.flatten(0, 1))))  # [(2s-1)^2, h]
        line = torch.arange(side, device=device)
        lag = line[:, None] - line[None, :] + side - 1  # [s, s]
        which = lag[:, None, :, None] * reach + lag[None, :, None, :]
        bias: Tensor = table[which.reshape(side * side, -1)].permute(2, 0, 1)
        return bias.contiguous()[None]  # fused kernels expect contiguous rows


def _state(weight: Tensor) -> tuple[object, ...]:
    """Return a key that changes when a weight's values, device or dtype change."""
    version = 0 if weight.is_inference() else weight._version
    return id(weight), version, weight.device, weight.dtype


class WindowBlock(nn.Module):
    """A pre-norm transformer block inside windows, without biases in the linear layers.

    Args:
        width: D.
        heads: attention heads; they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, bias=False)
        self.positions = PositionBias(heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, 4 * width, bias=False)

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Apply the block to windows [M, s*s, D] of side s."""
        x = x + self.attn(self.norm1(x), self.positions(side))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class MultiResolutionBlock(nn.Module):
    """Windowed attention on a map, at its own resolution (ratio 1) or at half of it (ratio 2, appendix B).

    At ratio 2 a strided convolution halves the map, and a transposed convolution up-samples the output:
    `mix * (x + up(block(down(x))))`.

    Args:
        width: D.
        heads: attention heads.
        ratio: 1 or 2.
        mix: factor on the sum at ratio 2.
    """

    def __init__(self, width: int, heads: int, ratio: int, mix: float = 1.0) -> None:
        super().__init__()
        assert ratio in (1, 2)
        self.halved, self.mix = ratio == 2, mix
        self.down = nn.Conv2d(width, width, 2, stride=2) if self.halved else nn.Identity()
        self.block = WindowBlock(width, heads)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2) if self.halved else nn.Identity()

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Apply the block to a map [B, D, H, W]; the side divides H and W (at ratio 2 their halves)."""
        low = self.down(x)
        grid = low.shape[-2], low.shape[-1]
        found: Tensor = self.up(map_of(self.block(windows_of(low, side), side), grid, side))
        return self.mix * (x + found) if self.halved else found


def windows_of(x: Tensor, side: int) -> Tensor:
    """Split a map [B, D, H, W] into windows [M, s*s, D]; no copy if it is channels-last and one window.

    Raises:
        SizeError: the side does not divide H and W.
    """
    d, grid = x.shape[1], (x.shape[2], x.shape[3])
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    return to_windows(tokens, grid, side).reshape(-1, side * side, d)


def map_of(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Invert `windows_of`: [M, s*s, D] -> a channels-last map [B, D, H, W]."""
    (h, w), d = grid, x.shape[-1]
    plane: Tensor = from_windows(x.reshape(-1, h * w, d), grid, side).unflatten(1, grid)
    return plane.permute(0, 3, 1, 2)

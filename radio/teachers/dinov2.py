"""DINOv2 (Oquab et al. 2023) as a teacher: ViT-S/B/L/g at patch 14, with or without registers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import load_state
from ..errors import ConfigError, did_you_mean
from ..types import Features, Teacher
from . import families, outlines
from .dinov2_layouts import ANCHORS, Resampling, to_official
from .frozen import Frozen
from .weights_file import read_weights

# Letters: B batch, T tokens, P class and register tokens, D width, H W grid, h w pixels.

PATCH = 14
TABLE = 37  # positions are stored for 518 pixels: 37 patches per side
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """The architecture of one member of the family; attention heads are 64 wide."""

    width: int
    depth: int
    swiglu: bool = False
    num_registers: int = 0


_SIZES = {
    "vits14": (384, 12, False),
    "vitb14": (768, 12, False),
    "vitl14": (1024, 24, False),
    "vitg14": (1536, 40, True),
}
MEMBERS = {
    f"{name}{suffix}": Member(width=width, depth=depth, swiglu=swiglu, num_registers=num_registers)
    for name, (width, depth, swiglu) in _SIZES.items()
    for suffix, num_registers in (("", 0), ("_reg", 4))
}


@families.register("dinov2")
def dinov2(name: str, file: Path | None) -> Teacher:
    """Load the member `name` with the weights in `file`, in the official layout, timm's or transformers'.

    Its summary is the class token and its tokens are the patch tokens, both after the last norm. It accepts
    any size that is a multiple of 14, and its native size is 224; positions are resampled as in the code that
    the weights come from.

    Raises:
        ConfigError: no such member.
        CheckpointError: no file, or not the weights of this member.
    """
    spec = f"dinov2:{name}"
    return load_dinov2(spec, _member(name), read_weights(spec, file, ANCHORS), f"{spec}@{file}")


@outlines.register("dinov2")
def outline(name: str) -> Teacher:
    """Build the member `name` on the meta device.

    Raises:
        ConfigError: no such member.
    """
    return outline_dinov2(f"dinov2:{name}", _member(name))


def _member(name: str) -> Member:
    if name not in MEMBERS:
        hint = did_you_mean(name, MEMBERS) or f"; known: {', '.join(MEMBERS)}"
        raise ConfigError(f"unknown DINOv2 member {name!r}{hint}")
    return MEMBERS[name]


def load_dinov2(name: str, member: Member, tensors: dict[str, Tensor], source: str) -> Frozen:
    """Build a frozen teacher of DINOv2's architecture with weights in any of the three layouts.

    Raises:
        CheckpointError: not the weights of this architecture; `source` names them.
    """
    official, resampling = to_official(tensors, source)
    with torch.device("meta"):
        trunk = DinoTrunk(member, resampling)
    load_state(trunk, official, source)
    return _freeze(trunk, name, member)


def outline_dinov2(name: str, member: Member) -> Frozen:
    """Build a teacher of DINOv2's architecture on the meta device."""
    with torch.device("meta"):
        trunk = DinoTrunk(member, Resampling())
    return _freeze(trunk, name, member)


def _freeze(trunk: DinoTrunk, name: str, member: Member) -> Frozen:
    return Frozen(
        trunk=trunk,
        name=name,
        mean=MEAN,
        std=STD,
        native_size=(16 * PATCH, 16 * PATCH),
        patch_size=PATCH,
        summary_dim=member.width,
        token_dim=member.width,
        variant=str(trunk.resampling),
    )


@final
class DinoTrunk(nn.Module):
    """DINOv2's transformer: normalised [B, 3, h, w] -> `Features`; parameters have the official names."""

    def __init__(self, member: Member, resampling: Resampling) -> None:
        super().__init__()
        width, num_registers = member.width, member.num_registers
        self.resampling = resampling
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE * TABLE, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width)) if num_registers else None
        self.patch_embed = _PatchEmbed(width)
        self.blocks = nn.ModuleList(_Block(width, member.swiglu) for _ in range(member.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Features:
        """Compute the features of normalised images whose sides are multiples of 14."""
        batch = len(images)
        patches = self.patch_embed(images)  # [B, D, H, W]
        grid = (patches.shape[2], patches.shape[3])
        patches = patches.flatten(2).transpose(1, 2) + self._positions(grid)
        prefix = [(self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        x = torch.cat([*prefix, patches], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Features(x[:, 0], x[:, -grid[0] * grid[1] :], grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Compute the positions of a grid's patches [1, T, D], resampled in float32 for other grids."""
        table = self.pos_embed[:, 1:]
        if grid == (TABLE, TABLE):
            return table
        plane = table.float().transpose(1, 2).reshape(1, -1, TABLE, TABLE)
        antialias, offset = self.resampling.antialias, self.resampling.offset
        if offset:
            scale = [(side + offset) / TABLE for side in grid]
            plane = F.interpolate(plane, scale_factor=scale, mode="bicubic", antialias=antialias)
        else:
            plane = F.interpolate(plane, size=grid, mode="bicubic", antialias=antialias)
        assert plane.shape[2:] == grid
        return plane.flatten(2).transpose(1, 2).to(table.dtype)


class _PatchEmbed(nn.Module):
    """Images [B, 3, h, w] -> patches [B, D, H, W]; a separate module for the official names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images)
        return patches


class _Block(nn.Module):
    """Attention and MLP, each normalised before and scaled per channel after: [B, P + T, D]."""

    def __init__(self, width: int, swiglu: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width)
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _SwiGlu(width) if swiglu else _Mlp(width)
        self.ls2 = _LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        y: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return y


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // 64
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        y: Tensor = self.proj(x.transpose(1, 2).reshape(batch, length, width))
        return y


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class _SwiGlu(nn.Module):
    """The giant's MLP: gate and value come from one layer, each two thirds of 4 * width, rounded up to 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        y: Tensor = self.w3(F.silu(gate) * value)
        return y

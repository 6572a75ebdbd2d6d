"""DINOv2 (Oquab et al. 2023) as a teacher: ViT-S/B/L/g at patch 14, with or without registers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import load_state
from ..errors import CheckpointError
from ..nn.vit import IMAGENET_MEAN, IMAGENET_STD, NORM_EPS, Block, LinearStem, SwiGLU
from ..types import Features, Teacher
from . import families
from .base import Frozen, find_member, read_weights

# Letters: B batch, T tokens, P class and register tokens, D width, H W grid, h w pixels.

PATCH = 14
TABLE = 37  # positions are stored for 518 pixels: 37 patches per side

# transformers' names and the official ones; query, key and value are concatenated afterwards.
_TRANSFORMERS = (
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)

ANCHORS = ("cls_token", "embeddings.cls_token")
"""Weights of every layout have one of these names: the official and timm's, or transformers'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampling:
    """How positions are resampled to another grid: bicubic, with the options in which the sources differ."""

    offset: float = 0.0  # patches added to the grid's sides in the scale's computation
    antialias: bool = False


class Layout(NamedTuple):
    """Weights under the official names, and the resampling of their original code."""

    tensors: dict[str, Tensor]
    resampling: Resampling


def to_official(tensors: dict[str, Tensor], source: str) -> Layout:
    """Rename DINOv2 weights in the official layout, timm's or transformers' to the official names.

    The official code resamples positions with offset 0.1 and no antialiasing, but those of its models with
    registers without offset and antialiased; timm always antialiases; transformers only with registers.

    Raises:
        CheckpointError: none of the three layouts; `source` names the file.
    """
    try:
        if any(name.endswith("embeddings.cls_token") for name in tensors):
            official = _from_transformers(tensors)
            resampling = Resampling(antialias="register_tokens" in official)
        elif "cls_token" not in tensors or "pos_embed" not in tensors:
            raise CheckpointError(
                f"{source}: not DINOv2 weights: wanted the keys of the official release, of timm or of "
                f"transformers, got {', '.join(list(tensors)[:3])} …"
            )
        elif "mask_token" not in tensors:  # timm drops it, the official files always have it
            official, resampling = _from_timm(tensors), Resampling(antialias=True)
        else:
            official = dict(tensors)
            antialias = "register_tokens" in official
            resampling = Resampling(antialias=True) if antialias else Resampling(offset=0.1)
    except (IndexError, TypeError, RuntimeError) as error:  # missing dimensions
        raise CheckpointError(f"{source}: not DINOv2 weights: tensors of odd shapes ({error})") from error
    official.pop("mask_token", None)
    return Layout(official, resampling)


def _from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    official = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        official[name] = tensor
    for name in [name for name in official if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in official for part in parts):
            official[name.replace("query", "qkv")] = torch.cat([official.pop(part) for part in parts])
    return official


def _from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    official = dict(tensors)
    first, second = (official.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        # The giant's fc1 outputs gate and value together, twice the input of fc2.
        official = {
            name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): tensor
            for name, tensor in official.items()
        }
    if "reg_token" in official:
        # In timm the class token includes its own position.
        official["register_tokens"] = official.pop("reg_token")
        positions = official["pos_embed"]
        official["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return official


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoArchitecture:
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
    f"{name}{suffix}": DinoArchitecture(width=width, depth=depth, swiglu=swiglu, num_registers=num_registers)
    for name, (width, depth, swiglu) in _SIZES.items()
    for suffix, num_registers in (("", 0), ("_reg", 4))
}


@families.register("dinov2")
def dinov2(name: str, file: Path | None, *, meta: bool = False) -> Teacher:
    """Load the member `name` with the weights in `file`, in the official layout, timm's or transformers'.

    Its summary is the class token and its tokens are the patch tokens, both after the last norm. It accepts
    any size that is a multiple of 14, and its native size is 224; positions are resampled as in the code that
    the weights come from.

    Raises:
        ConfigError: no such member.
        CheckpointError: no file, or not the weights of this member.
    """
    spec = f"dinov2:{name}"
    member = find_member(MEMBERS, name, "DINOv2 member")
    tensors = None if meta else read_weights(spec, file, ANCHORS)
    return load_dinov2(spec, member, tensors, f"{spec}@{file}", weights_file=file)


def load_dinov2(
    name: str,
    member: DinoArchitecture,
    tensors: dict[str, Tensor] | None,
    source: str,
    weights_file: Path | None = None,
) -> Frozen:
    """Build a frozen teacher of DINOv2's architecture with weights in any of the three layouts.

    Without tensors it stays on the meta device.

    Raises:
        CheckpointError: not the weights of this architecture; `source` names them.
    """
    layout = None if tensors is None else to_official(tensors, source)
    with torch.device("meta"):
        trunk = DinoTrunk(member, Resampling() if layout is None else layout.resampling)
    if layout is not None:
        load_state(trunk, layout.tensors, source)
    return Frozen(
        trunk=trunk,
        name=name,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        native_size=(16 * PATCH, 16 * PATCH),
        patch_size=PATCH,
        summary_dim=member.width,
        token_dim=member.width,
        variant=str(trunk.resampling),
        weights_file=weights_file,
    )


@final
class DinoTrunk(nn.Module):
    """DINOv2's transformer: normalised [B, 3, h, w] -> `Features`; parameters have the official names."""

    def __init__(self, member: DinoArchitecture, resampling: Resampling) -> None:
        super().__init__()
        width, num_registers = member.width, member.num_registers
        self.resampling, self.num_blocks = resampling, member.depth
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE * TABLE, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width)) if num_registers else None
        self.patch_embed = LinearStem(width, PATCH)
        self.blocks = nn.ModuleList(
            Block(width, width // 64, 4 * width, layer_scale=1.0) for _ in range(member.depth)
        )
        if member.swiglu:
            for block in self.blocks:
                block.mlp = SwiGLU(width, (4 * width * 2 // 3 + 7) // 8 * 8)  # two thirds of 4 * width
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, images: Tensor) -> Features:
        """Compute the features of normalised images whose sides are multiples of 14."""
        return self.intermediate(images, [self.num_blocks - 1])[0]

    def intermediate(self, images: Tensor, blocks: Sequence[int]) -> list[Features]:
        """Compute the features after each of the given blocks, all through the final norm."""
        batch = len(images)
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        patches = self.patch_embed(images) + self._positions(grid)
        prefix = [(self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        x = torch.cat([*prefix, patches], dim=1)
        outputs = {}
        for index, block in enumerate(self.blocks):
            if index > max(blocks):
                break
            x = block(x)
            if index in blocks:
                y = self.norm(x)
                outputs[index] = Features(y[:, 0], y[:, -grid[0] * grid[1] :], grid)
        return [outputs[index] for index in blocks]

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

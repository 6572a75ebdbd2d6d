"""SAM's image encoder (Kirillov et al. 2023) as a teacher: ViT-B/L/H at 1024 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ..checkpoint import load_state
from ..errors import CheckpointError, ConfigError, did_you_mean, require
from ..types import Features, Teacher
from . import families, outlines
from .frozen import Frozen
from .sam_attention import with_own_indices
from .weights_file import read_weights

# Letters: B batch, T tokens, D width, H W grid, h w pixels.

MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
_PREFIX = "image_encoder."

ANCHORS = ("image_encoder.patch_embed.proj.bias", "image_encoder.neck.0.weight")
"""Names that every released checkpoint of the whole SAM has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """The architecture of one released image encoder."""

    width: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]


MEMBERS = {
    "vit_b": Member(width=768, depth=12, num_heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": Member(width=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": Member(width=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31)),
}


@families.register("sam")
def sam(name: str, file: Path | None) -> Teacher:
    """Load the image encoder of the member `name` from an official checkpoint of the whole SAM.

    Its tokens are the last block's output, before the neck, and its summary is their mean. It accepts only
    1024 x 1024 pixels.

    Raises:
        ConfigError: no such member.
        CheckpointError: no file, not a SAM's, or one of another member (which is named).
        MissingExtraError: segment-anything is not installed.
    """
    member = _member(name)
    spec = f"sam:{name}"
    source = f"{spec}@{file}"
    tensors = {
        key.removeprefix(_PREFIX): tensor
        for key, tensor in read_weights(spec, file, ANCHORS).items()
        if key.startswith(_PREFIX)
    }
    _check_member(name, tensors, source)
    with torch.device("meta"):
        encoder = build_encoder(member)
    load_state(encoder, tensors, source)
    return freeze_sam(SamTrunk(encoder), name=spec, mean=MEAN, std=STD, weights_file=file)


@outlines.register("sam")
def outline(name: str) -> Teacher:
    """Build the image encoder of the member `name` on the meta device.

    Raises:
        ConfigError: no such member.
        MissingExtraError: segment-anything is not installed.
    """
    with torch.device("meta"):
        encoder = build_encoder(_member(name))
    return freeze_sam(SamTrunk(encoder), name=f"sam:{name}", mean=MEAN, std=STD)


def _member(name: str) -> Member:
    if name not in MEMBERS:
        hint = did_you_mean(name, MEMBERS) or f"; known: {', '.join(MEMBERS)}"
        raise ConfigError(f"unknown SAM member {name!r}{hint}")
    return MEMBERS[name]


def build_encoder(member: Member) -> nn.Module:
    """Build segment-anything's own image encoder of a released member, untrained.

    Raises:
        MissingExtraError: segment-anything is not installed.
    """
    library = require("segment_anything.modeling", extra="sam")
    encoder: nn.Module = library.ImageEncoderViT(
        img_size=1024,
        patch_size=16,
        embed_dim=member.width,
        depth=member.depth,
        num_heads=member.num_heads,
        mlp_ratio=4,
        out_chans=256,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=member.global_blocks,
    )
    return encoder


@final
class SamTrunk(nn.Module):
    """Any `segment_anything` `ImageEncoderViT` as a trunk; its neck stays at `encoder.neck`, unused here.

    The attention of its blocks is replaced by `SamAttention`, with the same weights and results.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = with_own_indices(encoder)

    @property
    def size(self) -> int:
        """Side in pixels of the square images that it accepts."""
        return int(self.encoder.img_size)

    @property
    def token_dim(self) -> int:
        """Width D of a token before the neck."""
        return int(self.encoder.patch_embed.proj.out_channels)

    def forward(self, images: Tensor) -> Features:
        """Map normalised [B, 3, size, size] to the last block's tokens, before the neck, and their mean."""
        x = self.encoder.patch_embed(images)  # [B, H, W, D]
        if self.encoder.pos_embed is not None:
            x = x + self.encoder.pos_embed
        for block in self.encoder.blocks:
            x = block(x)
        tokens = x.flatten(1, 2)
        return Features(tokens.mean(1), tokens, (x.shape[1], x.shape[2]))


def freeze_sam(
    trunk: SamTrunk,
    *,
    name: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    weights_file: Path | None = None,
) -> Frozen:
    """Wrap a SAM trunk as a teacher that accepts only the trunk's own size."""
    return Frozen(
        trunk=trunk,
        name=name,
        mean=mean,
        std=std,
        native_size=(trunk.size, trunk.size),
        patch_size=int(trunk.encoder.patch_embed.proj.stride[0]),
        fixed_size=True,
        summary_dim=trunk.token_dim,
        token_dim=trunk.token_dim,
        weights_file=weights_file,
    )


def _check_member(name: str, tensors: dict[str, Tensor], source: str) -> None:
    """Check that a file's weights are an image encoder, and not another member's; raise CheckpointError."""
    if not tensors:
        raise CheckpointError(
            f"{source}: no key starts with {_PREFIX!r}; wanted a checkpoint of the whole SAM, as released"
        )
    bias = tensors.get("patch_embed.proj.bias")
    for other, member in MEMBERS.items():
        if bias is not None and other != name and bias.shape == (member.width,):
            raise CheckpointError(f"{source}: these are the weights of {other}; name it sam:{other}@FILE")

"""Convert the three key layouts of DINOv2 weights to the official one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

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
_PARTS = ("query", "key", "value")

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
        return _to_official(tensors, source)
    except (IndexError, TypeError, RuntimeError) as error:  # missing dimensions
        raise CheckpointError(f"{source}: not DINOv2 weights: tensors of odd shapes ({error})") from error


def _to_official(tensors: dict[str, Tensor], source: str) -> Layout:
    if any(name.endswith("embeddings.cls_token") for name in tensors):
        return _from_transformers(tensors)
    if "cls_token" not in tensors or "pos_embed" not in tensors:
        raise CheckpointError(
            f"{source}: not DINOv2 weights: wanted the keys of the official release, of timm or of "
            f"transformers, got {', '.join(list(tensors)[:3])} …"
        )
    if "mask_token" not in tensors:  # timm drops it, the official files always have it
        return Layout(_from_timm(tensors), Resampling(antialias=True))
    has_registers = "register_tokens" in tensors
    resampling = Resampling(antialias=True) if has_registers else Resampling(offset=0.1)
    return Layout(_without_mask_token(tensors), resampling)


def _from_transformers(tensors: dict[str, Tensor]) -> Layout:
    renamed = {_rename(name): tensor for name, tensor in tensors.items()}
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in _PARTS]
        if all(part in renamed for part in parts):
            renamed[name.replace("query", "qkv")] = torch.cat([renamed.pop(part) for part in parts])
    antialias = "register_tokens" in renamed
    return Layout(_without_mask_token(renamed), Resampling(antialias=antialias))


def _rename(name: str) -> str:
    for pattern, replacement in _TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def _from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    official = dict(tensors)
    if _has_packed_swiglu(official):
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


def _has_packed_swiglu(tensors: dict[str, Tensor]) -> bool:
    """Check whether fc1 outputs gate and value together, twice the input of fc2, as in the giant."""
    first, second = tensors.get("blocks.0.mlp.fc1.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and len(first) == 2 * second.shape[1]


def _without_mask_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "mask_token"}

"""Makes small RADIO releases of random weights in their genuine layouts."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WIDTH, DEPTH, HIDDEN, PATCH, GRID = 128, 3, 256, 16, 8
HEADS = 2  # of 64 numbers
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(name: str, out: int, width: int, seed: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": random(seed, out, width) / math.sqrt(width),
        f"{name}.bias": 0.1 * random(seed + 1, out),
    }


def norm(name: str, width: int, seed: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * random(seed, width), f"{name}.bias": 0.1 * random(seed + 1, width)}


def block(name: str, width: int, hidden: int, seed: int, scale: str | None = None) -> dict[str, Tensor]:
    tensors = {
        **norm(f"{name}.norm1", width, seed),
        **linear(f"{name}.attn.qkv", 3 * width, width, seed + 2),
        **linear(f"{name}.attn.proj", width, width, seed + 4),
        **norm(f"{name}.norm2", width, seed + 6),
        **linear(f"{name}.mlp.fc1", hidden, width, seed + 8),
        **linear(f"{name}.mlp.fc2", width, hidden, seed + 10),
    }
    for place in ("ls1", "ls2") if scale else ():
        tensors[f"{name}.{place}.{scale}"] = 1 + 0.2 * random(seed + 12, width)
    return tensors


def trunk(
    prefix: int = 8,
    patch: int = PATCH,
    scale: str | None = None,
    final_norm: bool = False,
    *,
    width: int = WIDTH,
    depth: int = DEPTH,
    hidden: int = HIDDEN,
    grid: int = GRID,
) -> dict[str, Tensor]:
    """The weights of a trunk under the names of the releases."""
    tensors = {
        "patch_generator.pos_embed": random(1, 1, grid * grid, width),
        "patch_generator.embedder.weight": 0.05 * random(2, width, 3 * patch * patch),
        "patch_generator.cls_token.token": random(3, prefix, width),
    }
    for index in range(depth):
        tensors |= block(f"blocks.{index}", width, hidden, 100 * index + 10, scale)
    return tensors | (norm("norm", width, 7) if final_norm else {})


def mlp2(out: int, seed: int, steps: int = 1, width: int = WIDTH, hidden: int = 48) -> dict[str, Tensor]:
    tensors = linear("fc1", hidden, width, seed)
    for index in range(steps):
        tensors |= norm(f"blocks.{index}.0", hidden, seed + 3 + index)
        tensors |= linear(f"blocks.{index}.2", hidden, hidden, seed + 7 + index)
    return tensors | norm("final.0", hidden, seed + 20) | linear("final.2", out, hidden, seed + 22)


def mlp1(out: int, seed: int) -> dict[str, Tensor]:
    return {
        **linear("fc1", 48, WIDTH, seed),
        **norm("norm", 48, seed + 2),
        **linear("fc2", out, 48, seed + 4),
    }


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


CONDITIONER = {
    "norm_mean": torch.tensor(MEAN).view(3, 1, 1),
    "norm_std": torch.tensor(STD).view(3, 1, 1),
}


def teacher(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "open_clip", "model": "x", "fd_loss_weight": 1.0, **more}


def save_pickled(
    path: Path,
    tensors: dict[str, Tensor],
    teachers: Sequence[dict[str, Any]] = (),
    heads: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None,
    *,
    extra: dict[str, Tensor] | None = None,
    arguments: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a release as `.pth.tar`."""
    state = named("base_model.", tensors) | named("input_conditioner.", CONDITIONER) | (extra or {})
    for key, (summary, spatial) in (heads or {}).items():
        state |= named(f"_heads.{key}.", summary) | named(f"_feature_projections.{key}.", spatial)
    args = argparse.Namespace(
        model="vit",
        cls_token_per_teacher=True,
        teachers=list(teachers),
        lr=0.001,
        seed=None,
        **(arguments or {}),
    )
    torch.save({"arch": "vit", "epoch": 3, "args": args, "state_dict": state, **more}, path)
    return path


def save_hugging_face(
    folder: Path,
    tensors: dict[str, Tensor],
    slots: Sequence[int],
    adaptors: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a release as NVIDIA does on the Hugging Face hub; return the safetensors file."""
    folder.mkdir(exist_ok=True)
    state = named("radio_model.model.", tensors) | named("radio_model.input_conditioner.", CONDITIONER)
    state["radio_model.summary_idxs"] = torch.tensor(slots)
    for name, (summary, spatial) in (adaptors or {}).items():
        state |= named(f"radio_model.adaptors.{name}.head_mlp.", summary)
        state |= named(f"radio_model.adaptors.{name}.feat_mlp.", spatial)
    file = folder / "model.safetensors"
    safetensors.torch.save_file(state, file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return file

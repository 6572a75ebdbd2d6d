"""Token maps of images without augmentation, computed once and cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from radio.chunks import (
    Damage,
    Tensors,
    TensorSpec,
    check_all_there,
    chunk_path,
    find_missing,
    load_tensors,
    read_tensors,
    write_tensors,
)
from radio.dist import Group
from radio.errors import RadioError
from radio.io import check_writable
from radio.progress import ProgressFactory
from radio.provenance import fast_products
from radio.types import Backbone

from .images import Images, one_thread
from .presets import Size

# Letters: N images, B batch, D token width, H W grid.

CHUNK = 128  # images per file: the most that an interrupted run loses
_FORMAT = f"token maps/1 float16 in chunks of {CHUNK}"


def size_in_gb(model: Backbone, crop: Size, count: int, device: torch.device, dtype: torch.dtype) -> float:
    """Compute the size of the maps of `count` images in GB, from one forward pass of a grey image."""
    with torch.no_grad():
        tokens = model(torch.full((1, 3, *crop), 0.5, device=device, dtype=dtype)).tokens
    return tokens.numel() * 2 * count / 1e9


def token_maps(
    model: Backbone,
    images: Images,
    *,
    key: str,
    cache: Path,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    workers: int,
    group: Group,
    watch: ProgressFactory,
    damage: Damage,
    label: str,
) -> Tensor:
    """Compute or load from the cache the maps of stretched images: [N, D, H, W] float16 on the CPU.

    Rank r computes chunks r, r + world, ... into the same folder.

    Args:
        damage: records damaged files of the cache, which are then computed again.

    Raises:
        DataError: ranks do not share the cache folder.
        RadioError: tokens that are not finite in float16.
    """
    folder = cache / "token-maps" / hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    paths = [chunk_path(folder, number) for number in range(len(chunks))]
    mine = range(group.rank, len(chunks), group.world)
    places = find_missing([paths[number] for number in mine], partial(_read, chunks, model), damage)
    missing = [(mine[place], chunks[mine[place]]) for place in places]
    if missing:
        check_writable(folder, "--cache", utf8=True)
    with watch(label, sum(len(span) for _, span in missing)) as advance:
        for number, span in missing:
            batches = [list(span[start : start + batch]) for start in range(0, len(span), batch)]
            loader: DataLoader[Any] = DataLoader(
                images,
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=_stack,
                worker_init_fn=one_thread,
                pin_memory=device.type == "cuda",
            )
            parts = []
            for pixels in loader:
                parts.append(_encode(model, pixels.to(device, non_blocking=True), dtype))
                advance(len(pixels))
            write_tensors(paths[number], {"maps": torch.cat(parts)})
    group.barrier()
    check_all_there(paths)
    return torch.cat([load_tensors(path, ["maps"]).tensors["maps"] for path in paths])


def _read(chunks: Sequence[range], model: Backbone, path: Path) -> Tensors:
    """Read a chunk from the cache.

    Raises:
        DamagedError: the file differs from what was written.
    """
    count = len(chunks[int(path.stem)])
    return read_tensors(path, {"maps": TensorSpec(torch.float16, (count, model.token_dim, None, None))})


def _encode(model: Backbone, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Encode BGR bytes [B, 3, h, w] as maps [B, D, H, W]."""
    with fast_products(images.device), torch.no_grad():
        maps = model((images[:, [2, 1, 0]].float() / 255).to(dtype)).map().half().cpu()
    if not bool(torch.isfinite(maps).all()):
        raise RadioError(
            f"{model.name} gives tokens that are not finite in half precision; try --precision fp32 with "
            f"--no-keep-tokens, or look at the training"
        )
    return maps.contiguous()


def _stack(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["inputs"] for sample in samples])

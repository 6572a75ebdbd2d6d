"""Maps of tokens, computed once for pictures that are shown in one way only, kept by content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evals.core.chunks import check_all_there, chunk_path, is_whole
from evals.core.dist import Group
from evals.core.evaluator import Watch
from radio.errors import RadioError
from radio.io import write_bytes
from radio.types import Backbone

from .pictures import Pictures, one_thread
from .presets import Size

# Letters: N pictures, B batch, D token width, H W grid.

CHUNK = 128  # pictures a file: what a killed run loses at most
_FORMAT = f"token maps/1 float16 in chunks of {CHUNK}"


def size_in_gb(model: Backbone, crop: Size, count: int, device: torch.device, dtype: torch.dtype) -> float:
    """What the maps of `count` pictures take, found by one look at a grey picture."""
    with torch.no_grad():
        tokens = model(torch.full((1, 3, *crop), 0.5, device=device, dtype=dtype)).tokens
    return tokens.numel() * 2 * count / 1e9


def token_maps(
    model: Backbone,
    pictures: Pictures,
    *,
    key: str,
    cache: Path,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    workers: int,
    group: Group,
    watch: Watch,
    label: str,
) -> Tensor:
    """[N, D, H, W] float16 on the CPU: the maps of stretched pictures, from the cache where it has them.

    Rank r makes chunks r, r + world, ... into the same folder.

    Raises:
        DataError: ranks do not share the cache folder.
        RadioError: tokens that are not finite in float16.
    """
    folder = cache / "token-maps" / hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()
    chunks = [range(start, min(start + CHUNK, len(pictures))) for start in range(0, len(pictures), CHUNK)]
    mine = list(enumerate(chunks))[group.rank :: group.world]
    missing = [(number, span) for number, span in mine if not is_whole(chunk_path(folder, number))]
    with watch(label, sum(len(span) for _, span in missing)) as advance:
        for number, span in missing:
            batches = [list(span[start : start + batch]) for start in range(0, len(span), batch)]
            loader: DataLoader[Any] = DataLoader(
                pictures,
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=_stack,
                worker_init_fn=one_thread,
            )
            parts = []
            for images in loader:
                parts.append(_encode(model, images.to(device), dtype))
                advance(len(images))
            data = safetensors.torch.save({"maps": torch.cat(parts)})
            write_bytes(chunk_path(folder, number), data)
    group.barrier()
    paths = [chunk_path(folder, number) for number in range(len(chunks))]
    check_all_there(paths)
    return torch.cat([safetensors.torch.load_file(path)["maps"] for path in paths])


def _encode(model: Backbone, images: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, D, H, W] of BGR bytes [B, 3, h, w]."""
    with torch.no_grad():
        maps = model((images[:, [2, 1, 0]].float() / 255).to(dtype)).map().half().cpu()
    if not bool(torch.isfinite(maps).all()):
        raise RadioError(
            f"{model.name} gives tokens that are not finite in half precision; try --precision fp32 with "
            f"--no-keep-tokens, or look at the training"
        )
    return maps.contiguous()


def _stack(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["inputs"] for sample in samples])

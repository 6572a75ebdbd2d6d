"""Teacher features of fixed crops, computed once and trained from.

On a CPU real teachers are the whole cost of distillation. A cache holds, for every crop, its pixels and
each teacher's summary and tokens in half precision; its folder's name is a hash of everything they depend
on. Writing goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from radio.config import to_plain, write_text
from radio.errors import RadioError
from radio.types import Features, Teacher

from .config import DataConfig
from .crops import FixedCrops, check_broken, rows_of
from .sampling import picture_at
from .step import teacher_features

# Letters: N crops, C summary width, T tokens, D token width.

_CHUNK = 64  # crops between two notes of how far it got


class Cached(NamedTuple):
    """One crop with every teacher's features of it."""

    pixels: Tensor  # uint8 [3, side, side]
    summaries: dict[str, Tensor]  # [C] float16 each
    tokens: dict[str, Tensor]  # [T, D] float16 each


class FeatureCache(Dataset[Cached]):
    """A finished cache as an endless shuffled stream, by position."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.card = json.loads((folder / "card.json").read_text())
        self.count: int = self.card["count"]
        self.grids = {name: (grid[0], grid[1]) for name, grid in self.card["grids"].items()}
        self._arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}

    def __getitem__(self, position: int) -> Cached:
        """The crop at a position of the stream."""
        entry = picture_at(position, self.count, self.seed)
        row = {name: torch.from_numpy(array[entry].copy()) for name, array in self._arrays.items()}
        return Cached(
            row["pixels"],
            {name: row[f"{name}.summary"] for name in self.grids},
            {name: row[f"{name}.tokens"] for name in self.grids},
        )

    def targets(
        self, summaries: Mapping[str, Tensor], tokens: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Features]:
        """A collated batch of rows as features by teacher name, in float32 on the device."""
        return {
            name: Features(summaries[name].to(device).float(), tokens[name].to(device).float(), grid)
            for name, grid in self.grids.items()
        }


def cache_key(
    teachers: Mapping[str, Teacher], sizes: Mapping[str, tuple[int, int]], crops: FixedCrops, seed: int
) -> str:
    """Hex hash of teacher weights, their sizes, the data, and every setting of the crops."""
    config: DataConfig = crops.source.config
    settings = {
        "teachers": {name: (teacher.fingerprint, sizes[name]) for name, teacher in sorted(teachers.items())},
        "data": crops.source.pictures.fingerprint,
        "crop": (to_plain(config.crop_scale), to_plain(config.crop_aspect), config.flip, crops.source.side),
        "count": (crops.count, crops.crops),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_cache(
    root: Path,
    teachers: Mapping[str, Teacher],
    sizes: Mapping[str, tuple[int, int]],
    crops: FixedCrops,
    seed: int,
    *,
    device: torch.device,
    workers: int,
    confirm: Callable[[int], None],
    progress: Callable[[int], None],
) -> FeatureCache:
    """The cache of these teachers over these crops, written or finished first where it is not whole.

    Args:
        root: the folder of all caches.
        teachers: frozen, on `device`, by adaptor name.
        sizes: each teacher's (height, width) in pixels.
        crops: what to compute.
        seed: decides the crops and the order of training.
        device: where the teachers run.
        workers: loader processes.
        confirm: called with the size in bytes before a new cache is begun; raises to refuse it.
        progress: called with how many crops are done.

    Raises:
        RadioError: the disk has no room for it, `confirm` refused, or too many pictures are broken.
    """
    folder = root / cache_key(teachers, sizes, crops, seed)
    note, card = folder / "progress.json", folder / "card.json"
    if not card.is_file():
        probe = teacher_features(
            teachers, sizes, torch.zeros(1, 3, crops.source.side, crops.source.side, device=device)
        )
        if not note.is_file():
            _begin(folder, probe, len(crops), crops.source.side, confirm)
        _fill(folder, teachers, sizes, crops, device, workers, progress)
        grids = {name: list(features.grid) for name, features in probe.items()}
        write_text(card, json.dumps({"count": len(crops), "grids": grids}))
    return FeatureCache(folder, seed)


def _begin(
    folder: Path, probe: dict[str, Features], count: int, side: int, confirm: Callable[[int], None]
) -> None:
    """Lay out empty arrays, once their size is agreed to and there is room for them."""
    shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {"pixels": (np.uint8, (3, side, side))}
    for name, features in probe.items():
        shapes[f"{name}.summary"] = (np.float16, tuple(features.summary.shape[1:]))
        shapes[f"{name}.tokens"] = (np.float16, tuple(features.tokens.shape[1:]))
    size = count * sum(int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in shapes.values())
    confirm(size)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise RadioError(
            f"{folder}: a teacher cache of {size / 1e9:.1f} GB does not fit, {free / 1e9:.1f} GB are free; "
            f"take fewer pictures or crops, or another --cache.folder"
        )
    for name, (kind, shape) in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(count, *shape))
    write_text(folder / "progress.json", json.dumps({"done": 0, "broken": 0}))


def _fill(
    folder: Path,
    teachers: Mapping[str, Teacher],
    sizes: Mapping[str, tuple[int, int]],
    crops: FixedCrops,
    device: torch.device,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    note = folder / "progress.json"
    state = json.loads(note.read_text())
    arrays = {path.stem: np.lib.format.open_memmap(path, mode="r+") for path in folder.glob("*.npy")}
    rest = range(state["done"], len(crops))
    loader = DataLoader(Subset(crops, rest), batch_size=_CHUNK, num_workers=workers)
    done, broken = state["done"], state["broken"]
    for batch in rows_of(loader):
        images = batch.pixels.to(device).float().div_(255)
        rows = slice(done, done + len(images))
        arrays["pixels"][rows] = batch.pixels.numpy()
        for name, features in teacher_features(teachers, sizes, images).items():
            arrays[f"{name}.summary"][rows] = _half(features.summary, name)
            arrays[f"{name}.tokens"][rows] = _half(features.tokens, name)
        for array in arrays.values():
            array.flush()
        done, broken = rows.stop, broken + int(batch.broken.sum())
        check_broken(broken, done, crops.source.config)
        write_text(note, json.dumps({"done": done, "broken": broken}))
        progress(done)


def _half(features: Tensor, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    half = features.half()
    if not bool(torch.isfinite(half).all()):
        raise RadioError(f"teacher {name} gives features beyond half precision (65504); train with it online")
    return half.cpu().numpy()

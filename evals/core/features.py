"""Summaries of every picture, extracted once, kept under a hash of all that decides them.

The work is cut into chunks of pictures, one file each. A killed run goes on with the first chunk that is
missing; under torchrun rank r makes chunks r, r + world, ... into the same folder, so no picture is padded
or counted twice, and order and content do not depend on ranks, workers or batch size (up to the rounding
of the encoder's own matrix products).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from radio.errors import DataError, RadioError
from radio.io import check_writable
from radio.types import Backbone, Features

from .chunks import (
    Damage,
    DamagedError,
    Tensors,
    TensorSpec,
    check_all_there,
    chunk_path,
    find_missing,
    load_tensors,
    read_tensors,
    write_tensors,
)
from .data import ImageSource
from .dist import Group
from .evaluator import Advance, Watch, silent
from .report import Skipped
from .views import View

# Letters: N pictures, C summary width, B batch, h w input size.

CHUNK = 512  # pictures a file: what a killed run loses at most
_FORMAT = f"features/2 in chunks of {CHUNK}"
_SPECS = {
    "features": TensorSpec(torch.float32, None),  # [N, D], or the tokens [N, T, D]
    "indices": TensorSpec(torch.int64, (None,)),
}
_SKIPPED = TypeAdapter(list[tuple[str, str]])  # key, reason

Project = Callable[[Features], Tensor]
"""Features -> [B, C], what is kept of them."""


class Bank(NamedTuple):
    """Features of the pictures that could be read, in the order of the source."""

    features: Tensor  # [N, C] float32
    indices: Tensor  # [N] int64, places in the source


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """How features are made: what may change the numbers is part of the cache's key."""

    view: View
    device: torch.device
    dtype: torch.dtype = torch.float32
    head: str = "summary"  # names the projection in the key
    project: Project = lambda features: features.summary
    batch: int = 64
    workers: int = 0


@final
class Stored:
    """Features on disk, complete."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def load(self, rank: int = 0, world: int = 1) -> Bank:
        """The features of chunks rank, rank + world, ..., all of them by default."""
        numbers = range(rank, _num_chunks(self._count), world)
        loaded = [load_tensors(chunk_path(self._folder, number), _SPECS).tensors for number in numbers]
        parts = [part for part in loaded if len(part["indices"])]
        if not parts:  # more ranks than chunks, or nothing readable
            return Bank(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))
        features = torch.cat([part["features"] for part in parts])
        return Bank(features, torch.cat([part["indices"] for part in parts]))

    def indices(self) -> Tensor:
        """[N] int64, the places in the source of all pictures that could be read."""
        return self._listed[0]

    def skipped(self) -> tuple[Skipped, ...]:
        """The pictures that could not be read, in order."""
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[Tensor, tuple[Skipped, ...]]:
        indices, skipped = [], []
        for number in range(_num_chunks(self._count)):
            chunk = load_tensors(chunk_path(self._folder, number), ("indices",))
            indices.append(chunk.tensors["indices"])
            skipped += [Skipped(key=key, reason=reason) for key, reason in _skipped(chunk)]
        return torch.cat(indices), tuple(skipped)


def default_cache() -> Path:
    """Where features are kept unless told otherwise: `$XDG_CACHE_HOME/am-radio`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "am-radio"


def extract(
    model: Backbone,
    source: ImageSource,
    how: Extraction,
    *,
    cache: Path,
    group: Group | None = None,
    watch: Watch = silent,
    damage: Damage | None = None,
) -> Stored:
    """The features of a source, from the cache as far as they are there and undamaged.

    Args:
        damage: learns of damaged files of the cache.

    Raises:
        DataError: no picture can be read, or ranks do not share the cache folder.
        RadioError: the model gives values that are not finite.
    """
    group = group or Group()
    count = len(source.keys)
    if group.leads:  # hashes the content; the others then find the memo
        _ = source.fingerprint
    group.barrier()
    folder = cache / "features" / _key(model, source, how)
    numbers = range(group.rank, _num_chunks(count), group.world)
    paths = [chunk_path(folder, number) for number in numbers]
    places = find_missing(paths, partial(_check_chunk, source), damage or Damage())
    missing = [numbers[place] for place in places]
    if missing:
        check_writable(folder, "--cache")
        with watch(f"{model.name} on {source.name}", sum(len(_span(n, count)) for n in missing)) as advance:
            _fill(model, source, how, folder, missing, advance)
    group.barrier()
    check_all_there(chunk_path(folder, number) for number in range(_num_chunks(count)))
    stored = Stored(folder, count)
    if len(stored.indices()) == 0:
        first = stored.skipped()[0]
        raise DataError(f"{source.name}: none of {count} pictures can be read; {first.key}: {first.reason}")
    return stored


class _Item(NamedTuple):
    place: int  # in the source
    pixels: Tensor | None  # [3, h, w]
    reason: str


@final
class _Views(Dataset[_Item]):
    """Decoding and resizing, in the loader's workers."""

    def __init__(self, source: ImageSource, view: View) -> None:
        self._source, self._view = source, view

    def __getitem__(self, index: int) -> _Item:
        try:
            return _Item(index, self._view(self._source.read(index)), "")
        except DataError as error:
            return _Item(index, None, str(error))


def _fill(
    model: Backbone,
    source: ImageSource,
    how: Extraction,
    folder: Path,
    numbers: Sequence[int],
    advance: Advance,
) -> None:
    model = model.to(how.device, how.dtype).eval()
    spans = [_span(number, len(source.keys)) for number in numbers]
    batches = [
        list(span[start : start + how.batch]) for span in spans for start in range(0, len(span), how.batch)
    ]
    loader: DataLoader[_Item] = DataLoader(
        _Views(source, how.view), batch_sampler=batches, num_workers=how.workers, collate_fn=list
    )
    arriving: Iterator[list[_Item]] = iter(loader)
    for number, span in zip(numbers, spans, strict=True):
        parts: list[tuple[list[_Item], Tensor]] = []
        left = len(span)
        while left:
            items = next(arriving)
            read = [item for item in items if item.pixels is not None]
            parts.append((items, _encode(model, read, how)))
            left -= len(items)
            advance(len(items))
        _write(folder, number, parts, source)


def _encode(model: Backbone, items: Sequence[_Item], how: Extraction) -> Tensor:
    """[B, C] float32 on the CPU; pictures of one size go through the model together."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    pixels = [item.pixels for item in items if item.pixels is not None]
    for place, image in enumerate(pixels):
        by_size.setdefault(tuple(image.shape), []).append(place)
    rows: dict[int, Tensor] = {}
    for places in by_size.values():
        images = torch.stack([pixels[place] for place in places]).to(how.device, how.dtype)
        with torch.inference_mode():
            kept = how.project(model(images)).float().cpu()
        if not bool(torch.isfinite(kept).all()):
            raise RadioError(
                f"{model.name} gives values that are not finite as {how.dtype}; try --precision fp32, "
                f"or look at the training"
            )
        rows.update(zip(places, kept, strict=True))
    return torch.stack([rows[place] for place in range(len(pixels))]) if rows else torch.empty(0)


def _write(
    folder: Path, number: int, parts: Sequence[tuple[list[_Item], Tensor]], source: ImageSource
) -> None:
    items = [item for part, _ in parts for item in part]
    encoded = [features for _, features in parts if len(features)]
    features = torch.cat(encoded) if encoded else torch.empty(0, 0)
    indices = torch.tensor([item.place for item in items if item.pixels is not None], dtype=torch.int64)
    keys = source.keys
    skipped = [(keys[item.place], item.reason) for item in items if item.pixels is None]
    tensors = {"features": features, "indices": indices}
    write_tensors(chunk_path(folder, number), tensors, {"skipped": json.dumps(skipped)})


def _check_chunk(source: ImageSource, path: Path) -> None:
    """None, when a chunk on disk holds each of its pictures, once.

    Raises:
        DamagedError: it does not.
    """
    chunk = read_tensors(path, _SPECS)
    span = _span(int(path.stem), len(source.keys))
    keys = source.keys
    kept = chunk.tensors["indices"].tolist()
    left_out = {key for key, _ in _skipped(chunk)}
    wanted = [place for place in span if keys[place] not in left_out]
    if kept != wanted or len(kept) != len(chunk.tensors["features"]):
        raise DamagedError(f"{path}: holds {len(kept)} of the pictures {span.start} to {span.stop - 1}")


def _skipped(chunk: Tensors) -> list[tuple[str, str]]:
    try:
        return _SKIPPED.validate_json(chunk.metadata["skipped"])
    except (KeyError, ValidationError) as error:
        raise DamagedError(f"a file of features has no list of pictures left out ({error})") from error


def _key(model: Backbone, source: ImageSource, how: Extraction) -> str:
    parts = [_FORMAT, model.fingerprint, source.fingerprint, how.view.describe(), str(how.dtype), how.head]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _num_chunks(count: int) -> int:
    return -(-count // CHUNK)


def _span(number: int, count: int) -> range:
    return range(number * CHUNK, min((number + 1) * CHUNK, count))

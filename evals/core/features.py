"""Summaries of every image, extracted once and cached under a hash of everything that determines them.

The images are split into chunks, one file each. A killed run resumes with the first missing chunk; under
torchrun rank r computes chunks r, r + world, ... into the same folder, so no image is padded or counted
twice, and order and content do not depend on ranks, workers or batch size (up to the rounding of the
encoder's own matrix products).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from radio.benchmark import is_convolutional
from radio.chunks import (
    Damage,
    DamagedError,
    Tensors,
    TensorSpec,
    cached_chunks,
    chunk_path,
    load_tensors,
    read_tensors,
    write_tensors,
)
from radio.data import ImageSource
from radio.dist import Ranks
from radio.errors import ConfigError, DataError, RadioError, SizeError
from radio.images import (
    MAX_PIXELS,
    cover,
    evaluation_view,
    resize,
)
from radio.progress import ProgressFactory, UpdateProgress, no_progress
from radio.resources import check_memory, fast_products, has_tf32
from radio.types import Backbone, Features, find_adaptor

from .report import DatasetInfo, Skipped
from .task import ViewKind, ViewSettings

# Letters: N images, C summary width, B batch, h w input size.

CHUNK = 512  # images per file: the most that a killed run loses
_FORMAT = f"features/2 in chunks of {CHUNK}"
_SPECS = {
    "features": TensorSpec(torch.float32, None),  # [N, D], or the tokens [N, T, D]
    "indices": TensorSpec(torch.int64, (None,)),
}
_SKIPPED = TypeAdapter(list[tuple[str, str]])  # key, reason

Project = Callable[[Features], Tensor]
"""Features -> [B, C], the part that is cached."""


class ExtractedFeatures(NamedTuple):
    """Features of the images that could be read, in the order of the source."""

    features: Tensor  # [N, C] float32
    indices: Tensor  # [N] int64, indices into the source


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """How features are extracted; whatever may change the numbers is part of the cache key."""

    view: View
    device: torch.device
    dtype: torch.dtype = torch.float32
    head: str = "summary"  # names the projection in the key
    project: Project = lambda features: features.summary
    batch: int = 64
    workers: int = 0

    @property
    def numbers(self) -> str:
        """Precision of the model: `torch.float32`, `torch.bfloat16`, or `TF32` on a GPU that supports it."""
        return "TF32" if self.dtype == torch.float32 and has_tf32(self.device) else str(self.dtype)


@final
class StoredFeatures:
    """The complete features of a source, on disk."""

    def __init__(self, folder: Path, source: ImageSource) -> None:
        self.source = source
        self._folder, self._count = folder, len(source.keys)

    def load(self, rank: int = 0, world: int = 1) -> ExtractedFeatures:
        """Load the features of chunks rank, rank + world, ... (default: all of them)."""
        numbers = range(rank, _num_chunks(self._count), world)
        features, indices, end = torch.empty(0, 0), [torch.empty(0, dtype=torch.int64)], 0
        for number in numbers:
            part = load_tensors(chunk_path(self._folder, number), _SPECS).tensors
            if count := len(part["indices"]):
                if not end:  # filled chunk by chunk, so that nothing is in memory twice
                    features = torch.empty(CHUNK * len(numbers), *part["features"].shape[1:])
                features[end : end + count] = part["features"]
                indices.append(part["indices"])
                end += count
        return ExtractedFeatures(features[:end], torch.cat(indices))

    @cached_property
    def features(self) -> Tensor:
        """Features of all images that could be read, [N, C] float32."""
        return self.load().features

    @cached_property
    def labels(self) -> Tensor:
        """Classes of all images that could be read, [N] int64."""
        return torch.from_numpy(self.source.labels)[self.indices()]

    @cached_property
    def keys(self) -> list[str]:
        """Names of all images that could be read, [N]."""
        return [self.source.keys[index] for index in self.indices().tolist()]

    def info(self, role: str, *, scored: bool = True, num_classes: int | None = None) -> DatasetInfo:
        """Describe the data set for a report.

        Args:
            role: such as `query`.
            scored: False for data that the evaluator learns from.
            num_classes: (default: the source's).
        """
        return DatasetInfo(
            role=role,
            name=self.source.name,
            fingerprint=self.source.fingerprint,
            count=len(self.indices()),
            num_classes=len(self.source.classes) if num_classes is None else num_classes,
            skipped=self.skipped(),
            scored=scored,
        )

    def indices(self) -> Tensor:
        """Return the indices into the source, [N] int64, of all images that could be read."""
        return self._listed[0]

    def skipped(self) -> tuple[Skipped, ...]:
        """Return the images that could not be read, in order."""
        return self._listed[1]

    @cached_property
    def _listed(self) -> tuple[Tensor, tuple[Skipped, ...]]:
        indices, skipped = [], []
        for number in range(_num_chunks(self._count)):
            path = chunk_path(self._folder, number)
            chunk = load_tensors(path, ("indices",))
            indices.append(chunk.tensors["indices"])
            skipped += [Skipped(key=key, reason=reason) for key, reason in _skipped(chunk, path)]
        return torch.cat(indices), tuple(skipped)


def place(model: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Move the model to a device and type, in evaluation mode.

    For types other than float32 this is a copy: weights rounded in place would stay so for later tasks and
    for the fingerprint. On a CPU the kernels of a CNN are stored channels last, with which its convolutions
    are nearly twice as fast.
    """
    if dtype != torch.float32:
        model = copy.deepcopy(model)
    placed = model.to(device, dtype).eval()
    if device.type == "cpu" and isinstance(placed, nn.Module) and is_convolutional(placed):
        placed.to(memory_format=torch.channels_last)
    return placed


def check_finite(vectors: Tensor, whose: str) -> None:
    """Check that all values of some vectors are finite.

    Args:
        whose: their origin, for the error message.

    Raises:
        RadioError: NaN or infinity, which cannot be scored.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise RadioError(
            f"{whose} gives values that are not finite; try --precision fp32, or look at the training"
        )


def to_unit(vectors: Tensor) -> Tensor:
    """Normalise vectors [N, C] to length 1 in float32; lengths that over- or underflow use float64."""
    lengths: Tensor = torch.linalg.vector_norm(vectors.float(), dim=1)
    unit = vectors.float() / lengths.clamp_min(1e-12).unsqueeze(1)
    odd = ((lengths < 1e-12) | lengths.isinf()).nonzero().flatten()
    if len(odd):
        unit[odd] = F.normalize(vectors[odd].double(), dim=1, eps=1e-300).float()
    return unit


def extract(
    model: Backbone,
    source: ImageSource,
    how: Extraction,
    *,
    cache: Path,
    group: Ranks | None = None,
    watch: ProgressFactory = no_progress,
    damage: Damage | None = None,
) -> StoredFeatures:
    """Extract the features of a source, reusing the undamaged ones in the cache.

    Args:
        damage: collects the damaged files of the cache.

    Raises:
        DataError: no image can be read, or ranks do not share the cache folder.
        SizeError: a batch of images is larger than the memory.
        RadioError: the model returns values that are not finite.
    """
    group = group or Ranks()
    count = len(source.keys)
    check_memory(model, min(how.batch, CHUNK, count), how.view.size, how.device, how.dtype)
    group.on_leader(lambda: source.fingerprint)  # hashes the content; the other ranks then read the memo
    folder = cache / "features" / _key(model, source, how)

    def make(missing: list[int]) -> None:
        total = sum(len(_span(number, count)) for number in missing)
        with watch(f"{model.name} on {source.name}", total) as advance:
            _fill(model, source, how, folder, missing, advance)

    cached_chunks(
        folder, _num_chunks(count), read=partial(_check_chunk, source), make=make, ranks=group, damage=damage
    )
    stored = StoredFeatures(folder, source)
    if len(stored.indices()) == 0:
        first = stored.skipped()[0]
        raise DataError(f"{source.name}: none of {count} images can be read; {first.key}: {first.reason}")
    return stored


class _Item(NamedTuple):
    place: int  # in the source
    pixels: Tensor | None  # [3, h, w]
    reason: str


class ImageBatch(NamedTuple):
    """Images that were read, in one tensor, since each tensor that a worker sends costs a file descriptor."""

    places: list[int]  # in the source
    reasons: list[str]  # why an image could not be read; empty where it could
    sizes: list[tuple[list[int], tuple[int, ...]]]  # rows of equal size among the readable, and their shape
    pixels: Tensor  # flat, size by size

    def images(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the readable images [B, 3, h, w] in [0, 1] on a device, those of one size together."""
        pixels, start = self.pixels.to(device, non_blocking=True), 0
        for rows, shape in self.sizes:
            end = start + len(rows) * math.prod(shape)
            images = pixels[start:end].view(len(rows), *shape)
            yield images.clone() if start else images  # aligned in memory as a separate tensor
            start = end


@final
class _Views(Dataset[_Item]):
    """Data set that decodes and resizes images in the loader's workers."""

    def __init__(self, source: ImageSource, view: View) -> None:
        self._source, self._view = source, view

    def __getitem__(self, index: int) -> _Item:
        try:
            return _Item(index, self._view(self._source.read(index)), "")
        except DataError as error:
            return _Item(index, None, str(error))


def _collate(items: Sequence[_Item]) -> ImageBatch:
    pixels = [item.pixels for item in items if item.pixels is not None]
    by_size: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(pixels):
        by_size.setdefault(tuple(image.shape), []).append(row)
    flat = [pixels[row].reshape(-1) for rows in by_size.values() for row in rows]
    return ImageBatch(
        places=[item.place for item in items],
        reasons=[item.reason for item in items],
        sizes=[(rows, shape) for shape, rows in by_size.items()],
        pixels=torch.cat(flat) if flat else torch.empty(0),
    )


def read_batches(
    source: ImageSource,
    view: View,
    batches: Sequence[list[int]],
    *,
    workers: int,
    device: torch.device,
) -> Iterator[ImageBatch]:
    """Read batches of images, each through a view; those that cannot be read are told in their batch.

    Args:
        batches: indices into the source.
        workers: loader processes; 0 = read in this one.
        device: where the images are used.
    """
    yield from DataLoader(
        _Views(source, view),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )


def _fill(
    model: Backbone,
    source: ImageSource,
    how: Extraction,
    folder: Path,
    numbers: Sequence[int],
    advance: UpdateProgress,
) -> None:
    placed = place(model, how.device, how.dtype)
    spans = [_span(number, len(source.keys)) for number in numbers]
    batches = [
        list(span[start : start + how.batch]) for span in spans for start in range(0, len(span), how.batch)
    ]
    arriving = read_batches(source, how.view, batches, workers=how.workers, device=how.device)
    for number, span in zip(numbers, spans, strict=True):
        parts: list[tuple[ImageBatch, Tensor]] = []
        left = len(span)
        while left:
            batch = next(arriving)
            with fast_products(how.device), torch.inference_mode():
                encoded = _encode(placed, batch, how)
            parts.append((batch._replace(pixels=torch.empty(0)), encoded))  # a chunk's images take gigabytes
            left -= len(batch.places)
            advance(len(batch.places))
        _write(folder, number, parts, source, f"{model.name} as {how.numbers}")


def _encode(model: Backbone, batch: ImageBatch, how: Extraction) -> Tensor:
    """Encode the readable images, grouped by size as in the batch: [B, C] float32 on the device."""
    encoded = [how.project(model(images.to(how.dtype))).float() for images in batch.images(how.device)]
    return torch.cat(encoded) if encoded else torch.empty(0, 0, device=how.device)


def _write(
    folder: Path, number: int, parts: Sequence[tuple[ImageBatch, Tensor]], source: ImageSource, whose: str
) -> None:
    encoded = [features for _, features in parts if len(features)]
    order: list[int] = []  # of the images in `encoded`; sorted here, where no GPU waits for it
    for batch, _ in parts:
        first = len(order)
        order += [first + row for rows, _ in batch.sizes for row in rows]
    features = torch.cat(encoded).cpu()[torch.tensor(order).argsort()] if encoded else torch.empty(0, 0)
    check_finite(features, whose)
    pairs = [pair for batch, _ in parts for pair in zip(batch.places, batch.reasons, strict=True)]
    indices = torch.tensor([index for index, reason in pairs if not reason], dtype=torch.int64)
    skipped = [(source.keys[index], reason) for index, reason in pairs if reason]
    tensors = {"features": features, "indices": indices}
    write_tensors(chunk_path(folder, number), tensors, {"skipped": json.dumps(skipped)})


def _check_chunk(source: ImageSource, path: Path) -> None:
    """Check that a chunk on disk holds each of its images once.

    Raises:
        DamagedError: it does not.
    """
    chunk = read_tensors(path, _SPECS)
    span = _span(int(path.stem), len(source.keys))
    keys = source.keys
    kept = chunk.tensors["indices"].tolist()
    left_out = {key for key, _ in _skipped(chunk, path)}
    expected = [index for index in span if keys[index] not in left_out]
    if kept != expected or len(kept) != len(chunk.tensors["features"]):
        raise DamagedError(f"{path}: holds {len(kept)} of the images {span.start} to {span.stop - 1}")


def _skipped(chunk: Tensors, path: Path) -> list[tuple[str, str]]:
    try:
        return _SKIPPED.validate_json(chunk.metadata["skipped"])
    except (KeyError, ValidationError) as error:
        raise DamagedError(f"{path}: has no list of the images left out") from error


def _key(model: Backbone, source: ImageSource, how: Extraction) -> str:
    parts = [_FORMAT, model.fingerprint, source.fingerprint, how.view.describe(), how.numbers, how.head]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _num_chunks(count: int) -> int:
    return -(-count // CHUNK)


def _span(number: int, count: int) -> range:
    return range(number * CHUNK, min((number + 1) * CHUNK, count))


MAX_ASPECT = 32
"""Largest aspect ratio of a whole image; a longer strip would take gigabytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Preprocessing of an image into an encoder's input."""

    kind: ViewKind
    size: tuple[int, int]  # (height, width) of the crop; of the square to cover for short-side
    ratio: float  # resize to ratio * size before the crop; unused for short-side
    nearest_size: Callable[[int, int], tuple[int, int]]  # the backbone's own

    def __call__(self, image: Tensor) -> Tensor:
        """Convert a uint8 image [3, H, W] to the input, float [3, h, w] in [0, 1].

        Raises:
            DataError: its aspect ratio is above `MAX_ASPECT`.
        """
        if self.kind == "center":
            return evaluation_view(image, self.size, self.ratio)
        height, width = image.shape[-2:]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise DataError(
                f"{height}x{width} (height x width) is over {MAX_ASPECT} times as long as wide; "
                f"crop it, or take --view center"
            )
        height, width = cover(height, width, self.size)
        return resize(image, self.nearest_size(height, width))

    def describe(self) -> str:
        """Describe everything that determines the input, for cache keys and reports."""
        size = f"{self.size[0]}x{self.size[1]}"
        if self.kind == "center":
            return f"resize to cover {self.ratio:.6g} x {size} bicubic antialiased, centre crop {size}"
        return f"short side to cover {size} bicubic antialiased, whole image, sides fitted to the backbone"


def default_workers(device: torch.device) -> int:
    """Return the default number of loader processes: none on a CPU, up to 8 with a GPU."""
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def make_view(model: Backbone, settings: ViewSettings) -> tuple[View, tuple[str, ...]]:
    """Create the view for a model, with notes.

    The size is rounded to the nearest that the model accepts.

    Raises:
        SizeError: a view of more than `MAX_PIXELS`.
    """
    kind, size, ratio = settings.view, settings.size, settings.ratio
    fitted = model.native_size if size is None else model.nearest_size(size, size)
    resized = [side if kind == "short-side" else round(ratio * side) for side in fitted]
    if math.prod(resized) > MAX_PIXELS:
        raise SizeError(
            f"images of {fitted[0]}x{fitted[1]} px are cut out of {resized[0]}x{resized[1]}; the limit is "
            f"{MAX_PIXELS / 1e6:.0f} million pixels; give a smaller --size or --ratio"
        )
    view, notes = View(kind=kind, size=fitted, ratio=ratio, nearest_size=model.nearest_size), []
    taken = f"{model.name} takes {fitted[0]}x{fitted[1]}"
    if size is not None and fitted != (size, size):
        notes.append(f"{size} px was asked for; {taken}, which was used")
    if kind == "short-side" and model.fixed_size:
        notes.append(f"{taken} only, so whole images of another aspect ratio are stretched to it")
    return view, tuple(notes)


def view_size(model: Backbone, settings: ViewSettings) -> tuple[int, int]:
    """Return the size (height, width) of a model's view; that of a whole image is its least.

    Raises:
        SizeError: as `make_view`.
    """
    return make_view(model, settings)[0].size


# Letters: B batch, C summary width.

_CARRIED = 16_384  # summaries per call of an adaptor


def to_teacher_space(model: Backbone, head: str | None, summaries: Tensor) -> Tensor:
    """Map extracted summaries [B, C] into the space of teacher `head`; None leaves them unchanged.

    One extraction serves every head. Computed on the CPU in float32, as it is a small part of the work.
    """
    if head is None:
        return summaries
    adaptor = find_adaptor(model.to(torch.device("cpu"), torch.float32), head)
    with torch.inference_mode():
        carried = torch.cat([adaptor.adapt_summary(part) for part in summaries.split(_CARRIED)])
    check_finite(carried, f"{model.name} in the space of {head}")
    return carried


def check_head(model: Backbone, head: str | None) -> None:
    """Check that a model has an adaptor for teacher `head`, if one is named.

    Raises:
        ConfigError: it has none.
    """
    if head is None:
        return
    if not model.adaptors:
        raise ConfigError(f"{model.name} has no adaptors, so no head {head!r}; leave --head out")
    to_teacher_space(model, head, torch.empty(0, model.summary_dim))  # an unknown name raises here

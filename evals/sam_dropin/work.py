"""Process all images in chunks: prefetched, distributed over ranks, with one cache file of records per chunk.

A chunk is a fixed number of consecutive images, independent of the number of ranks and of where a run was
interrupted; a repeated run processes the missing chunks only. So the results are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import torch
from pydantic import TypeAdapter
from torch import Tensor

from radio.chunks import (
    Damage,
    DamagedError,
    TensorSpec,
    check_all_there,
    chunk_path,
    find_missing,
    read_records,
    read_tensors,
    write_records,
    write_tensors,
)
from radio.dist import Group
from radio.errors import RadioError
from radio.io import check_writable
from radio.memory import check_memory
from radio.progress import ProgressFactory
from radio.provenance import fast_products, has_tf32

from .annotations import CocoImage
from .clicks import next_clicks
from .decoding import (
    Clock,
    Predictions,
    Prepared,
    Prompts,
    box_prompts,
    masks_by_image,
    owners,
    predict_masks,
)
from .encoder import DropIn
from .frame import make_frame, place
from .settings import SamSettings

# Letters: B images of a chunk, P prompts of a chunk, C h w embedding.

_FORMAT = "sam-dropin/2"
_ENDING = "jsonl"  # of the file with a chunk's records
_THREADS = 2  # for loading images and masks while the encoder runs
_AHEAD = 3  # chunks to prefetch


class Done(NamedTuple):
    """A finished chunk."""

    images: int
    encoder: float | None  # seconds; None where the embeddings were cached
    decoder: float
    records: tuple[tuple[Any, ...], ...]


_DONE = TypeAdapter(Done)


class Annotated(Protocol):
    """Images with objects to segment: ground truth, or a detector's boxes."""

    @property
    def name(self) -> str:
        """Name for progress bars and errors."""

    @property
    def images(self) -> tuple[CocoImage, ...]:
        """The images, in a fixed order."""

    @property
    def content(self) -> str:
        """A hash of the images' bytes."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that is read."""

    def read(self, image: CocoImage) -> Tensor:
        """Read an image's pixels, uint8 [3, H, W]."""

    def masks(self, image: CocoImage) -> Tensor:
        """Return the ground truth of an image's objects, bool [N, H, W]; N is 0 where it has none."""


Judge = Callable[[list[Prepared], Predictions], Sequence[tuple[Any, ...]]]
"""Computes the records of a chunk from its images and predictions."""


@final
@dataclass(frozen=True)
class Work:
    """Prediction of the masks of all objects, and their records by `judge`."""

    data: Annotated
    judge: Judge
    drop_in: DropIn
    settings: SamSettings
    device: torch.device
    cache: Path
    box_batch: int
    damage: Damage  # of the cache

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder."""
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    @property
    def numbers(self) -> str:
        """Precision of the encoder: its dtype, or `TF32` on a GPU that has it."""
        return "TF32" if self.dtype == torch.float32 and has_tf32(self.device) else str(self.dtype)

    def run(self, group: Group, watch: ProgressFactory) -> list[Done]:
        """Process all chunks; return them in order, on every rank.

        Raises:
            SizeError: a batch of images does not fit in memory.
            DataError: an image or mask that cannot be read, or ranks that do not share the cache folder.
            RadioError: the model or the decoder outputs values that are not finite.
        """
        chunks = self._chunks()
        side, batch = self.drop_in.side, max(map(len, chunks))
        check_memory(self.drop_in.model, batch, (side, side), self.device, self.dtype)
        group.on_leader(lambda: self.data.fingerprint)  # hashes the content; other ranks read the memo
        folder = self.cache / "sam" / self.key()
        paths = [chunk_path(folder, number, _ENDING) for number in range(len(chunks))]
        mine = range(group.rank, len(chunks), group.world)
        missing = [mine[i] for i in find_missing([paths[n] for n in mine], _read, self.damage)]
        error = None
        try:
            self._make(missing, chunks, paths, watch)
        except RadioError as problem:
            error = problem
        group.agree(error)
        check_all_there(paths)
        return [_read(path) for path in paths]

    def _make(
        self,
        missing: Sequence[int],
        chunks: Sequence[tuple[CocoImage, ...]],
        paths: Sequence[Path],
        watch: ProgressFactory,
    ) -> None:
        if missing:
            check_writable(paths[0].parent, "--cache", utf8=True)
            total = sum(len(chunks[number]) for number in missing)
            with watch(f"{self.drop_in.model.name} on {self.data.name}", total) as advance:
                for number, loaded in prefetch(missing, lambda n: self._load(chunks[n]), _THREADS, _AHEAD):
                    write_records(paths[number], [self.finish(loaded)])
                    advance(len(loaded))

    def key(self) -> str:
        """Hash everything that determines the records."""
        settings = self.settings
        return _hash(
            _FORMAT,
            self._embedding_key,
            self.data.fingerprint,
            settings.prompts,
            settings.clicks,
            settings.union_bias,
            self.box_batch,
            settings.detections is not None,
        )

    def load(self, images: tuple[CocoImage, ...], embeddings: Tensor | None = None) -> list[Prepared]:
        """Load a chunk's images and masks, without pixels if its embeddings [B, C, h, w] are given."""
        side, head = self.drop_in.side, self.drop_in.head
        return [
            Prepared(
                image,
                make_frame(*image.size, head.side),
                place(self.data.read(image), side, head.mean) if embeddings is None else None,
                self.data.masks(image),
                None if embeddings is None else embeddings[index],
            )
            for index, image in enumerate(images)
        ]

    def _load(self, images: tuple[CocoImage, ...]) -> list[Prepared]:
        """Load a chunk with its cached embeddings, if any."""
        return self.load(images, self._known_embeddings(images))

    def finish(self, loaded: list[Prepared]) -> Done:
        """Compute the records of a loaded chunk."""
        clock = Clock(self.device)
        with torch.inference_mode():
            embeddings, encoded = self._embeddings(loaded)
            encoder = clock.lap()
            self._check_finite(embeddings, self.drop_in.model.name)
            if encoded and self.settings.keep_embeddings:
                path = self._embedding_path(tuple(one.image for one in loaded))
                write_tensors(path, {"embeddings": embeddings.cpu()})
            clock.lap()
            predictions = self.answer(loaded, embeddings)
            decoder = clock.lap()
            for values in predictions:
                self._check_finite(values, f"the decoder of {self.drop_in.head.name}")
            records = tuple(self.judge(loaded, predictions))
        return Done(len(loaded), encoder if encoded else None, decoder, records)

    def embed(self, loaded: list[Prepared]) -> Tensor:
        """Embed a chunk's pixels: [B, C, h, w]."""
        pixels = torch.stack([one.pixels for one in loaded if one.pixels is not None])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        with fast_products(self.device):
            return self._placed.embed(pixels.to(self.device, non_blocking=True), self.dtype)

    def answer(self, loaded: list[Prepared], embeddings: Tensor) -> Predictions:
        """Predict the masks of a chunk's prompts."""
        which, batch = owners(loaded, self.device), self.box_batch
        if self.settings.prompts == "boxes":
            return predict_masks(
                self._placed.head, embeddings, which, box_prompts(loaded, self.device), batch
            )
        return self._click(loaded, embeddings, which)

    def _embeddings(self, loaded: list[Prepared]) -> tuple[Tensor, bool]:
        """Return a chunk's embeddings [B, C, h, w], cached or computed, and whether the encoder ran."""
        known = [one.embedding for one in loaded if one.embedding is not None]
        if known:
            return torch.stack(known).to(self.device), False
        return self.embed(loaded), True

    def _known_embeddings(self, images: tuple[CocoImage, ...]) -> Tensor | None:
        """Read embeddings [B, C, h, w] from the cache; return None where they must be computed."""
        path = self._embedding_path(images)
        if not self.settings.keep_embeddings or not path.exists():
            return None
        shape = (len(images), None, *self.drop_in.head.grid)
        try:
            return read_tensors(path, {"embeddings": TensorSpec(torch.float32, shape)}).tensors["embeddings"]
        except DamagedError as error:
            self.damage.add(error)
            return None

    def _check_finite(self, values: Tensor, who: str) -> None:
        if not bool(torch.isfinite(values).all()):
            remedy = "look at its training"
            if self.dtype != torch.float32:
                remedy = f"try --precision fp32, or {remedy}"
            raise RadioError(f"{who} gives values that are not finite as {self.numbers}; {remedy}")

    def _click(self, loaded: list[Prepared], embeddings: Tensor, which: Tensor) -> Predictions:
        head, batch = self._placed.head, self.box_batch
        clicked = [next_clicks(one.truth, None) for one in loaded]
        prompts = _with_clicks(Prompts(), loaded, clicked, self.device)
        predictions = predict_masks(head, embeddings, which, prompts, batch)
        for _ in range(self.settings.clicks - 1):
            pieces: dict[int, list[Tensor]] = {one.image.number: [] for one in loaded}
            for one, _piece, masks in masks_by_image(head, loaded, predictions.logits, batch):
                pieces[one.image.number].append(masks.cpu())
            clicked = [next_clicks(one.truth, torch.cat(pieces[one.image.number])) for one in loaded]
            prompts = _with_clicks(prompts, loaded, clicked, self.device)
            predictions = predict_masks(head, embeddings, which, prompts, batch)
        return predictions

    def _chunks(self) -> list[tuple[CocoImage, ...]]:
        images, size = self.data.images, self.settings.batch
        return [images[start : start + size] for start in range(0, len(images), size)]

    @cached_property
    def _placed(self) -> DropIn:
        return self.drop_in.to(self.device, self.dtype)

    @cached_property
    def _embedding_key(self) -> str:
        drop_in = self.drop_in
        return _hash(
            _FORMAT,
            drop_in.model.fingerprint,
            drop_in.adaptor_fingerprint,
            drop_in.head.fingerprint,
            drop_in.side,
            self.numbers,
            self.device.type,
            self.settings.batch,
        )

    def _embedding_path(self, images: tuple[CocoImage, ...]) -> Path:
        names = [image.name for image in images]
        name = _hash(self._embedding_key, self.data.content, names)
        return self.cache / "sam-embeddings" / f"{name}.safetensors"


def prefetch(
    numbers: Iterable[int], load: Callable[[int], list[Prepared]], threads: int, depth: int
) -> Iterator[tuple[int, list[Prepared]]]:
    """Yield each number with its loaded chunk, in order, while the next `depth` are being loaded."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[int, Future[list[Prepared]]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(load, number)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read(path: Path) -> Done:
    """Read a chunk from the cache.

    Raises:
        DamagedError: the file differs from what was written.
    """
    entries = read_records(path, _DONE)
    if len(entries) != 1:
        raise DamagedError(f"{path}: holds {len(entries)} records, wanted 1")
    return entries[0]


def _with_clicks(
    prompts: Prompts, loaded: list[Prepared], clicked: list[tuple[Tensor, Tensor]], device: torch.device
) -> Prompts:
    """Append one click to each prompt."""
    placed = [one.frame.points(points) for one, (points, _) in zip(loaded, clicked, strict=True)]
    points = torch.cat(placed)[:, None].to(device)
    labels = torch.cat([label for _, label in clicked])[:, None].to(device)
    if prompts.points is not None and prompts.labels is not None:
        points = torch.cat((prompts.points, points), dim=1)
        labels = torch.cat((prompts.labels, labels), dim=1)
    return Prompts(points=points, labels=labels)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()

"""Prediction and scoring of the masks of all objects, in chunks of images that are cached.

A chunk is a fixed number of consecutive images, independent of the number of ranks and of where a run was
interrupted. So the results are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from evals.core.evaluator import EvalRun
from radio.chunks import (
    DamagedError,
    TensorSpec,
    cached_chunks,
    chunk_path,
    read_records,
    read_tensors,
    write_records,
    write_tensors,
)
from radio.errors import RadioError, require
from radio.resources import check_memory, fast_products

from .annotations import CocoImage
from .data import Instances
from .encoder import DropIn
from .masks import (
    Frame,
    Predictions,
    Prompts,
    boundaries,
    default_prompt_batch,
    fill,
    make_frame,
    next_clicks,
    overlap,
    pack,
    predict_masks,
    resize_and_pad,
)

# Letters: B images of a chunk, P prompts of a chunk, C h w embedding, N objects of an image, H W its size.

_FORMAT = "sam-dropin/3"
_ENDING = "jsonl"  # of the file with a chunk's records
_THREADS = 2  # for loading images and masks while the encoder runs
_PREFETCH = 3  # chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskScore:
    """The scores of one instance."""

    image_id: int
    annotation_id: int
    category_id: int
    area: float
    crowd: bool
    quality: float  # the IoU that the decoder predicts
    iou: float
    boundary_iou: float
    box_iou: float  # of the filled box


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedMask:
    """The mask of one detection as compressed run lengths."""

    image_id: int
    entry: int  # index in the detector's file
    counts: str
    size: tuple[int, int]  # (H, W)
    quality: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The results of consecutive images, as they are cached."""

    images: int
    encoder_seconds: float | None  # None where the embeddings were cached
    decoder_seconds: float
    records: list[MaskScore] | list[EncodedMask]


_CHUNK = TypeAdapter(Chunk)


class Prepared(NamedTuple):
    """An image that is ready for the encoder."""

    image: CocoImage
    frame: Frame
    pixels: Tensor | None  # [3, side, side]; None where the embedding is cached
    truth: Tensor  # bool [N, H, W]; N is 0 where the ground truth is not used
    embedding: Tensor | None = None  # [C, h, w]; None where it is not cached


@final
class Predictor:
    """Predicts the masks of objects on images, in batches over images and prompts.

    Args:
        clicks: points for each object, placed by the ground truth; 0 for its box.
        union_bias: constant added to the union.
        prompt_batch: prompts per decoder batch (default: the device's).
        keep_embeddings: cache the embeddings for later runs with other prompts.
        has_truth: whether the masks are scored; without, their run lengths are recorded.
    """

    def __init__(
        self,
        drop_in: DropIn,
        data: Instances,
        run: EvalRun,
        *,
        clicks: int = 0,
        union_bias: float = 0.0,
        prompt_batch: int | None = None,
        keep_embeddings: bool = False,
        has_truth: bool = True,
    ) -> None:
        self.drop_in, self.data, self.run = drop_in, data, run
        self.prompt_batch = prompt_batch or default_prompt_batch(drop_in.head, run.device)
        self.batch_size = run.batch_size(4)
        self._clicks, self._union_bias = clicks, union_bias
        self._keep_embeddings, self._has_truth = keep_embeddings, has_truth

    def score_all(self, images: Sequence[CocoImage], fingerprint: str, name: str) -> list[Chunk]:
        """Return the results of all images, in order, on every rank; compute those that are not cached.

        Args:
            fingerprint: of the images and their objects.
            name: for progress bars.

        Raises:
            SizeError: a batch of images does not fit in memory.
            DataError: an image or mask that cannot be read, or ranks that do not share the cache folder.
            RadioError: the model or the decoder outputs values that are not finite.
        """
        run, side = self.run, self.drop_in.side
        batches = [
            images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)
        ]
        check_memory(self.drop_in.model, max(map(len, batches)), (side, side), run.device, run.dtype)
        key = [self._embedding_key, fingerprint, self._clicks, self._union_bias, self.prompt_batch]
        folder = run.cache / "sam" / _hash(*key, self._has_truth)

        def make(missing: list[int]) -> None:
            total = sum(len(batches[number]) for number in missing)
            with run.progress(f"{self.drop_in.model.name} on {name}", total) as advance:
                for number, loaded in prefetch(missing, lambda number: self.load(batches[number])):
                    write_records(chunk_path(folder, number, _ENDING), [asdict(self.score(loaded))])
                    advance(len(loaded))

        paths = cached_chunks(
            folder,
            len(batches),
            read=_read_chunk,
            make=make,
            ranks=run.ranks,
            damage=run.damage,
            ending=_ENDING,
        )
        return [_read_chunk(path) for path in paths]

    def load(self, images: Sequence[CocoImage]) -> list[Prepared]:
        """Load images, and the masks of their objects where they are used; no pixels of cached embeddings."""
        head, embeddings = self.drop_in.head, self._cached_embeddings(images)
        loaded = []
        for index, image in enumerate(images):
            pixels = embedding = None
            if embeddings is None:
                pixels = resize_and_pad(self.data.read(image), self.drop_in.side, head.mean)
            else:
                embedding = embeddings[index]
            none = torch.empty(0, *image.size, dtype=torch.bool)
            truth = self.data.masks(image) if self._has_truth else none
            loaded.append(Prepared(image, make_frame(*image.size, head.side), pixels, truth, embedding))
        return loaded

    @torch.inference_mode()
    def score(self, loaded: Sequence[Prepared]) -> Chunk:
        """Compute the results of loaded images."""
        started = _now(self.run.device)
        embeddings = self.embed(loaded)
        encoder_seconds = None if loaded[0].embedding is not None else _now(self.run.device) - started
        self._check_finite(embeddings, self.drop_in.model.name)
        if self._keep_embeddings and encoder_seconds is not None:
            path = self._embedding_path([each.image for each in loaded])
            write_tensors(path, {"embeddings": embeddings.cpu()})
        started = _now(self.run.device)
        predictions = self.predict(loaded, embeddings)
        decoder_seconds = _now(self.run.device) - started
        for values in predictions:
            self._check_finite(values, f"the decoder of {self.drop_in.head.name}")
        return Chunk(
            images=len(loaded),
            encoder_seconds=encoder_seconds,
            decoder_seconds=decoder_seconds,
            records=self._overlaps(loaded, predictions)
            if self._has_truth
            else self._run_lengths(loaded, predictions),
        )

    def embed(self, loaded: Sequence[Prepared]) -> Tensor:
        """Embed images, or take their cached embeddings: [B, C, h, w]."""
        device, cached = self.run.device, [each.embedding for each in loaded if each.embedding is not None]
        if cached:
            return torch.stack(cached).to(device)
        pixels = torch.stack([each.pixels for each in loaded if each.pixels is not None])
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        with fast_products(device):
            return self._placed.embed(pixels.to(device, non_blocking=True), self.run.dtype)

    def predict(self, loaded: Sequence[Prepared], embeddings: Tensor) -> Predictions:
        """Predict the masks of all objects on embedded images."""
        device, head = self.run.device, self._placed.head
        counts = torch.tensor([len(each.image.instances) for each in loaded])
        image_index = torch.arange(len(loaded)).repeat_interleave(counts).to(device)
        if not self._clicks:
            boxes = [each.frame.points(stored_boxes(each.image).view(-1, 2, 2)) for each in loaded]
            prompts = Prompts(boxes=torch.cat(boxes).reshape(-1, 4).to(device))
            return predict_masks(head, embeddings, image_index, prompts, self.prompt_batch)
        prompts, predictions = Prompts(), None
        for _ in range(self._clicks):
            masks: list[Tensor | None] = [None] * len(loaded)
            if predictions is not None:
                masks = self._collect_masks(loaded, predictions.logits)
            clicks = [next_clicks(each.truth, mask) for each, mask in zip(loaded, masks, strict=True)]
            points = [each.frame.points(p) for each, (p, _) in zip(loaded, clicks, strict=True)]
            labels = torch.cat([label for _, label in clicks])
            prompts = prompts.add_click(torch.cat(points).to(device), labels.to(device))
            predictions = predict_masks(head, embeddings, image_index, prompts, self.prompt_batch)
        assert predictions is not None
        return predictions

    def masks_by_image(
        self, loaded: Sequence[Prepared], logits: Tensor
    ) -> Iterator[tuple[Prepared, slice, Tensor]]:
        """Yield slices of each image's objects: the image, the slice, and its masks, bool [n, H, W]."""
        head, first = self._placed.head, 0
        for each in loaded:
            count = len(each.image.instances)
            for start in range(0, count, self.prompt_batch):
                part = slice(start, min(start + self.prompt_batch, count))
                low = logits[first + part.start : first + part.stop]
                yield each, part, each.frame.masks(low) > head.threshold
            first += count

    def _collect_masks(self, loaded: Sequence[Prepared], logits: Tensor) -> list[Tensor | None]:
        """Collect the masks of each image, on the CPU."""
        parts: dict[int, list[Tensor]] = {each.image.id: [] for each in loaded}
        for each, _, masks in self.masks_by_image(loaded, logits):
            parts[each.image.id].append(masks.cpu())
        return [torch.cat(part) for part in parts.values()]

    def _overlaps(self, loaded: Sequence[Prepared], predictions: Predictions) -> list[MaskScore]:
        device, parts = predictions.logits.device, []
        for each, part, masks in self.masks_by_image(loaded, predictions.logits):
            size, bits, truth = each.image.size, pack(masks), pack(each.truth[part].to(device))
            boxes = fill(stored_boxes(each.image)[part].to(device), size)
            edges = boundaries(bits, size), boundaries(truth, size)
            pairs = ((bits, truth), edges, (boxes, truth))
            parts.append(torch.stack([overlap(*pair, self._union_bias) for pair in pairs]))
        values = torch.cat([torch.cat(parts, dim=1), predictions.quality.double()[None]]).cpu().T.tolist()
        instances = [(each.image, instance) for each in loaded for instance in each.image.instances]
        return [
            MaskScore(
                image_id=image.id,
                annotation_id=instance.id,
                category_id=instance.category,
                area=instance.area,
                crowd=instance.crowd,
                quality=quality,
                iou=iou,
                boundary_iou=boundary,
                box_iou=box,
            )
            for (image, instance), (iou, boundary, box, quality) in zip(instances, values, strict=True)
        ]

    def _run_lengths(self, loaded: Sequence[Prepared], predictions: Predictions) -> list[EncodedMask]:
        library = require("pycocotools.mask", extra="sam")
        records, quality = [], iter(predictions.quality.cpu().tolist())
        for each, part, masks in self.masks_by_image(loaded, predictions.logits):
            planes = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
            records += [
                EncodedMask(
                    image_id=each.image.id,
                    entry=instance.id,
                    counts=lengths["counts"].decode("ascii"),
                    size=each.image.size,
                    quality=next(quality),
                )
                for instance, lengths in zip(each.image.instances[part], library.encode(planes), strict=True)
            ]
        return records

    def _check_finite(self, values: Tensor, whose: str) -> None:
        if not bool(torch.isfinite(values).all()):
            remedy = "look at its training"
            if self.run.dtype != torch.float32:
                remedy = f"try --precision fp32, or {remedy}"
            raise RadioError(f"{whose} gives values that are not finite as {self.run.precision}; {remedy}")

    def _cached_embeddings(self, images: Sequence[CocoImage]) -> Tensor | None:
        """Read embeddings [B, C, h, w] from the cache; return None where they must be computed."""
        if not self._keep_embeddings:
            return None
        path = self._embedding_path(images)
        if not path.exists():
            return None
        shape = (len(images), None, *self.drop_in.head.grid)
        try:
            return read_tensors(path, {"embeddings": TensorSpec(torch.float32, shape)}).tensors["embeddings"]
        except DamagedError as error:
            self.run.damage.add(error)
            return None

    def _embedding_path(self, images: Sequence[CocoImage]) -> Path:
        name = _hash(self._embedding_key, self.data.files.fingerprint, [image.name for image in images])
        return self.run.cache / "sam-embeddings" / f"{name}.safetensors"

    @cached_property
    def _embedding_key(self) -> str:
        """Hash of everything that determines the embeddings of an image."""
        drop_in = self.drop_in
        return _hash(
            _FORMAT,
            drop_in.model.fingerprint,
            drop_in.adaptor_fingerprint,
            drop_in.head.fingerprint,
            drop_in.side,
            self.run.precision,
            self.run.device.type,
            self.batch_size,
        )

    @cached_property
    def _placed(self) -> DropIn:
        return self.drop_in.to(self.run.device, self.run.dtype)


def _now(device: torch.device) -> float:
    """Read the clock after the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stored_boxes(image: CocoImage) -> Tensor:
    """Return the boxes of an image's objects: [N, 4] in pixels of the stored image."""
    return torch.tensor([instance.box for instance in image.instances], dtype=torch.float64)


def prefetch(
    numbers: Iterable[int], load: Callable[[int], list[Prepared]]
) -> Iterator[tuple[int, list[Prepared]]]:
    """Yield each number with its loaded chunk, in order, while the next `_PREFETCH` are being loaded."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[int, Future[list[Prepared]]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(load, number)))
                if len(waiting) > _PREFETCH:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read_chunk(path: Path) -> Chunk:
    """Read a chunk from the cache.

    Raises:
        DamagedError: the file differs from what was written.
    """
    chunks = read_records(path, _CHUNK)
    if len(chunks) != 1:
        raise DamagedError(f"{path}: holds {len(chunks)} records, wanted 1")
    return chunks[0]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()

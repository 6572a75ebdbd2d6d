"""Decoding of one chunk of images: prompts are decoded in batches, and the masks scored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from radio.teachers.sam_decoder import SamHead, decode

from .annotations import CocoImage
from .bits import pack
from .frame import Frame
from .scoring import Record, boundaries, fill, overlap

_CACHED = 2**20  # embedding values in one batch on a CPU

# Letters: N instances of an image, P prompts of a chunk, K clicks, C h w embedding, H W stored image.


class Prompts(NamedTuple):
    """The prompts of the objects, in the frame: boxes [P, 4], or points [P, K, 2] with labels [P, K]."""

    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None

    def rows(self, part: slice) -> Prompts:
        """Select a slice of the prompts."""
        return Prompts(*(None if value is None else value[part] for value in self))


class Prepared(NamedTuple):
    """An image that is ready for the encoder, with its ground truth."""

    image: CocoImage
    frame: Frame
    pixels: Tensor | None  # [3, side, side]; None where the embedding is cached
    truth: Tensor  # bool [N, H, W]
    embedding: Tensor | None = None  # [C, h, w]; None where it is not cached


class Predictions(NamedTuple):
    """The best mask of each prompt, as output by the decoder."""

    logits: Tensor  # [P, 4 * h, 4 * w]
    quality: Tensor  # [P]


def prompts_together(head: SamHead, device: torch.device) -> int:
    """Choose the default number of prompts per batch: each has a copy of the embedding."""
    if device.type != "cpu":
        return 64
    width: int = head.mask_decoder.transformer_dim
    return max(1, _CACHED // (width * head.grid[0] * head.grid[1]))


def predict_masks(
    head: SamHead, embeddings: Tensor, which: Tensor, prompts: Prompts, box_batch: int
) -> Predictions:
    """Select the mask with the highest predicted IoU of each prompt's three, `box_batch` prompts at a time.

    Args:
        embeddings: [B, C, h, w].
        which: index of each prompt's image: [P].
    """
    parts = []
    for start in range(0, len(which), box_batch):
        part = slice(start, start + box_batch)
        some = prompts.rows(part)
        found = decode(
            head, embeddings, which[part], boxes=some.boxes, points=some.points, labels=some.labels
        )
        quality, best = found.quality.max(dim=1)
        parts.append((found.logits[torch.arange(len(best), device=best.device), best], quality))
    logits, quality = (torch.cat(part) for part in zip(*parts, strict=True))
    return Predictions(logits, quality)


def box_prompts(loaded: Sequence[Prepared], device: torch.device) -> Prompts:
    """Map the ground-truth boxes of all instances of a chunk into the frame."""
    boxes = [one.frame.points(stored_boxes(one.image).view(-1, 2, 2)).reshape(-1, 4) for one in loaded]
    return Prompts(boxes=torch.cat(boxes).to(device))


def stored_boxes(image: CocoImage) -> Tensor:
    """Return the boxes of an image's instances: [N, 4] in pixels of the stored image."""
    return torch.tensor([instance.box for instance in image.instances], dtype=torch.float64)


def owners(loaded: Sequence[Prepared], device: torch.device) -> Tensor:
    """Compute the index in the chunk of each instance's image: [P]."""
    counts = torch.tensor([len(one.image.instances) for one in loaded])
    return torch.arange(len(loaded)).repeat_interleave(counts).to(device)


def masks_by_image(
    head: SamHead, loaded: Sequence[Prepared], logits: Tensor, box_batch: int
) -> Iterator[tuple[Prepared, slice, Tensor]]:
    """Yield slices of each image's instances: the image, the slice, and its masks, bool [n, H, W]."""
    first = 0
    for one in loaded:
        count = len(one.image.instances)
        for start in range(0, count, box_batch):
            piece = slice(start, min(start + box_batch, count))
            low = logits[first + piece.start : first + piece.stop]
            yield one, piece, one.frame.masks(low) > head.threshold
        first += count


def score(
    head: SamHead, loaded: Sequence[Prepared], predictions: Predictions, box_batch: int, bias: float
) -> list[Record]:
    """Score the instances of a chunk: a record for each, in order."""
    device, found = predictions.logits.device, []
    for one, piece, masks in masks_by_image(head, loaded, predictions.logits, box_batch):
        size, drawn_bits, truth = one.image.size, pack(masks), pack(one.truth[piece].to(device))
        boxes = fill(stored_boxes(one.image)[piece].to(device), size)
        edges = boundaries(drawn_bits, size), boundaries(truth, size)
        found.append(
            torch.stack([overlap(*pair, bias) for pair in ((drawn_bits, truth), edges, (boxes, truth))])
        )
    values = torch.cat([torch.cat(found, dim=1), predictions.quality.double()[None]]).cpu().T.tolist()
    instances = [(one.image, instance) for one in loaded for instance in one.image.instances]
    return [
        Record(
            image_id=image.number,
            annotation_id=instance.number,
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


class Clock:
    """Measures seconds on a device, after waiting for its queued work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        start, self._start = self._start, self._now()
        return self._start - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

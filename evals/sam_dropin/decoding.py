"""One chunk of pictures: embedded together, their prompts decoded in batches, their masks scored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from radio.teachers.sam_decoder import SamHead, decode

from .annotations import Picture
from .bits import pack
from .frame import Frame
from .scoring import Record, boundaries, fill, overlap

_CACHED = 2**20  # values of embeddings that a CPU is given at once

# Letters: N instances of a picture, P prompts of a chunk, K clicks, C h w embedding, H W stored picture.


class Prompts(NamedTuple):
    """What stands for each object, in the frame: boxes [P, 4], or points [P, K, 2] with labels [P, K]."""

    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None

    def rows(self, part: slice) -> Prompts:
        """Some of them."""
        return Prompts(*(None if value is None else value[part] for value in self))


class Loaded(NamedTuple):
    """A picture, ready."""

    picture: Picture
    frame: Frame
    pixels: Tensor | None  # [3, side, side]; None where the embedding is known
    truth: Tensor  # bool [N, H, W]
    embedding: Tensor | None = None  # [C, h, w], where the cache has it


class Drawn(NamedTuple):
    """The best mask of each prompt, as the decoder gives it."""

    logits: Tensor  # [P, 4 * h, 4 * w]
    quality: Tensor  # [P]


def prompts_together(head: SamHead, device: torch.device) -> int:
    """How many prompts to decode at once where nobody said: each has its own copy of the embedding."""
    if device.type != "cpu":
        return 64
    width: int = head.mask_decoder.transformer_dim
    return max(1, _CACHED // (width * head.grid[0] * head.grid[1]))


def draw(head: SamHead, embeddings: Tensor, which: Tensor, prompts: Prompts, box_batch: int) -> Drawn:
    """Of three masks a prompt the one with the highest predicted IoU, `box_batch` prompts at a time.

    Args:
        embeddings: [B, C, h, w].
        which: the picture of each prompt: [P].
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
    return Drawn(logits, quality)


def box_prompts(loaded: Sequence[Loaded], device: torch.device) -> Prompts:
    """The ground-truth boxes of all instances of a chunk, in the frame."""
    boxes = [one.frame.points(stored_boxes(one.picture).view(-1, 2, 2)).reshape(-1, 4) for one in loaded]
    return Prompts(boxes=torch.cat(boxes).to(device))


def stored_boxes(picture: Picture) -> Tensor:
    """The boxes of a picture's instances: [N, 4] in its own pixels."""
    return torch.tensor([instance.box for instance in picture.instances], dtype=torch.float64)


def owners(loaded: Sequence[Loaded], device: torch.device) -> Tensor:
    """The place in the chunk of each instance's picture: [P]."""
    counts = torch.tensor([len(one.picture.instances) for one in loaded])
    return torch.arange(len(loaded)).repeat_interleave(counts).to(device)


def masks_by_picture(
    head: SamHead, loaded: Sequence[Loaded], logits: Tensor, box_batch: int
) -> Iterator[tuple[Loaded, slice, Tensor]]:
    """For pieces of each picture's instances: the picture, which of them, and their masks, bool [n, H, W]."""
    first = 0
    for one in loaded:
        count = len(one.picture.instances)
        for start in range(0, count, box_batch):
            piece = slice(start, min(start + box_batch, count))
            low = logits[first + piece.start : first + piece.stop]
            yield one, piece, one.frame.masks(low) > head.threshold
        first += count


def score(head: SamHead, loaded: Sequence[Loaded], drawn: Drawn, box_batch: int, bias: float) -> list[Record]:
    """A record for each instance of a chunk, in order."""
    device, found = drawn.logits.device, []
    for one, piece, masks in masks_by_picture(head, loaded, drawn.logits, box_batch):
        size, drawn_bits, truth = one.picture.size, pack(masks), pack(one.truth[piece].to(device))
        boxes = fill(stored_boxes(one.picture)[piece].to(device), size)
        edges = boundaries(drawn_bits, size), boundaries(truth, size)
        found.append(
            torch.stack([overlap(*pair, bias) for pair in ((drawn_bits, truth), edges, (boxes, truth))])
        )
    values = torch.cat([torch.cat(found, dim=1), drawn.quality.double()[None]]).cpu().T.tolist()
    instances = [(one.picture, instance) for one in loaded for instance in one.picture.instances]
    return [
        Record(
            image_id=picture.number,
            annotation_id=instance.number,
            category_id=instance.category,
            area=instance.area,
            crowd=instance.crowd,
            quality=quality,
            iou=iou,
            boundary_iou=boundary,
            box_iou=box,
        )
        for (picture, instance), (iou, boundary, box, quality) in zip(instances, values, strict=True)
    ]


class Clock:
    """Seconds spent on a device, without what is still queued there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        start, self._start = self._start, self._now()
        return self._start - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

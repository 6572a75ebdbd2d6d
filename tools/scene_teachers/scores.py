"""Scores of the scenes teachers by short protocols; the teachers' metadata contain them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.knn.index import Index, vote
from evals.zeroshot.evaluator import rank_classes
from evals.zeroshot.texts import class_vectors
from radio.ops import resize_images
from radio.scenes.language import TEMPLATES
from radio.scenes.world import CLASSES, Split, render, render_images
from radio.teachers.base import Frozen
from radio.teachers.sam import decode
from radio.teachers.scenes import SIDE
from radio.types import Backbone

from .losses import SIZE

# Letters: N images, C width, P prompts, R reference images.

_CHUNK = 100  # scenes at a time
_SMALL = 25 * 25  # pixels of 96 x 96: no main object is smaller, few small ones are larger


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Numbers of scenes of seed 0 that the scores are measured on."""

    bank: int  # of the train split
    queries: int  # of the val split
    sam_scenes: int  # of the val split


FULL = Protocol(bank=6000, queries=1500, sam_scenes=500)
QUICK = Protocol(bank=1500, queries=400, sam_scenes=100)

Scores = dict[str, float]


def score(teacher: Frozen, protocol: Protocol) -> Scores:
    """Measure k-NN and, with a text tower, zero-shot accuracy, in percent."""
    bank, bank_labels = summaries(teacher, protocol.bank, "train")
    queries, labels = summaries(teacher, protocol.queries, "val")
    predictions = {"knn": knn(bank, bank_labels, queries)}
    if teacher.text is not None:
        vectors = class_vectors(teacher.text, CLASSES, TEMPLATES)
        predictions["zero_shot"] = rank_classes(queries, vectors).classes[:, 0]
    return {
        name: 100 * float((predicted == labels).float().mean()) for name, predicted in predictions.items()
    }


def summaries(backbone: Backbone, count: int, split: Split) -> tuple[Tensor, Tensor]:
    """Compute summaries [N, C] and labels [N] of the first `count` scenes of a split."""
    chunks: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, count, _CHUNK):
        indices = range(start, min(start + _CHUNK, count))
        images, chunk_labels = render_images(indices, split=split, seed=0, size=SIZE)
        pixels = resize_images(torch.from_numpy(images).float() / 255, backbone.native_size)
        with torch.no_grad():
            chunks.append(backbone(pixels).summary)
        labels.append(torch.from_numpy(chunk_labels))
    return torch.cat(chunks), torch.cat(labels)


def knn(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classify [N] by votes of the k nearest in bank [R, C], with weights exp(cosine / temperature)."""
    nearest = Index(bank, torch.arange(len(bank))).search(queries, k)
    labels = bank_labels[nearest.ids]
    num_classes = int(bank_labels.max()) + 1
    return vote(nearest.similarities, labels, (k,), num_classes=num_classes, temperature=temperature)[k][:, 0]


def box_miou(sam: Any, count: int) -> Scores:
    """Measure mean IoU in percent over all objects of the first `count` val scenes, prompted by true boxes.

    The mask with the highest predicted IoU is used, at 96 px. `filled_box` is the score of filled boxes as
    masks; `small` and `large` split the objects at 25 x 25 visible pixels.
    """
    ious, fills, areas = (torch.cat(parts) for parts in zip(*_box_ious(sam, count), strict=True))
    small = areas < _SMALL
    return {
        "box_miou": 100 * float(ious.mean()),
        "filled_box": 100 * float(fills.mean()),
        "small": 100 * float(ious[small].mean()),
        "large": 100 * float(ious[~small].mean()),
    }


def _box_ious(sam: Any, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the IoU of each object's mask and filled box, and its area, some scenes at a time: [P] each."""
    for start in range(0, count, _CHUNK):
        indices = range(start, min(start + _CHUNK, count))
        scenes = [render(index, split="val", seed=0, size=SIZE) for index in indices]
        image_ids = torch.tensor([row for row, scene in enumerate(scenes) for _ in scene.objects])
        boxes = torch.tensor([item.box for scene in scenes for item in scene.objects]).float()
        masks = torch.stack(
            [
                torch.from_numpy(scene.instances == number)
                for scene in scenes
                for number in range(1, len(scene.objects) + 1)
            ]
        )
        pixels = torch.stack([torch.from_numpy(scene.image) for scene in scenes]).float() / 255
        with torch.no_grad():
            predicted = _predict_masks(sam, pixels, image_ids, boxes)
        yield iou(predicted, masks), iou(filled(boxes), masks), masks.sum(dim=(1, 2))


def _predict_masks(sam: Any, images: Tensor, image_ids: Tensor, boxes: Tensor) -> Tensor:
    pixels = 255 * resize_images(images, (SIDE, SIDE))
    embeddings = sam.image_encoder((pixels - sam.pixel_mean) / sam.pixel_std)
    logits, quality = decode(sam, embeddings, image_ids, boxes=boxes * (SIDE / SIZE))
    best = logits[torch.arange(len(logits)), quality.argmax(dim=1)][:, None]
    return F.interpolate(best, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0] > 0


def filled(boxes: Tensor) -> Tensor:
    """Convert half-open boxes [P, 4] to filled masks [P, 96, 96]."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    line = torch.arange(SIZE)
    across, down = (line >= x0) & (line < x1), (line >= y0) & (line < y1)
    return down[:, :, None] & across[:, None, :]


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Compute the IoU of each pair of masks [P, H, W]: [P]."""
    return (one & other).sum(dim=(1, 2)) / (one | other).sum(dim=(1, 2)).clamp(min=1)

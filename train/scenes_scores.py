"""Scores of the tiny scenes teachers by short protocols; the teachers' metadata contain them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.knn.index import Index, vote
from evals.zeroshot.evaluator import rank_classes
from evals.zeroshot.texts import class_vectors
from radio.resample import resize_images
from radio.scenes.language import TEMPLATES
from radio.scenes.world import CLASSES, Scene, Split, render, render_images
from radio.teachers.frozen import Frozen
from radio.teachers.sam_decoder import decode
from radio.teachers.scenes_sam import SIDE
from radio.types import Backbone

# Letters: N images, C width, K classes, P prompts, R reference images.

SIZE = 96
_CHUNK = 100
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
    scores = {"knn": _percent(knn(bank, bank_labels, queries), labels)}
    if teacher.text is not None:
        predicted = rank_classes(queries, class_vectors(teacher.text, CLASSES, TEMPLATES)).classes[:, 0]
        scores |= {"zero_shot": _percent(predicted, labels)}
    return scores


def summaries(backbone: Backbone, count: int, split: Split, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Compute summaries [N, C] and labels [N] of the first `count` scenes of a split."""
    found: list[Tensor] = []
    known: list[Tensor] = []
    for start in range(0, count, _CHUNK):
        images, labels = render_images(
            range(start, min(start + _CHUNK, count)), split=split, seed=seed, size=SIZE
        )
        pixels = resize_images(torch.from_numpy(images).float() / 255, backbone.native_size)
        with torch.no_grad():
            found.append(backbone(pixels).summary)
        known.append(torch.from_numpy(labels))
    return torch.cat(found), torch.cat(known)


def knn(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classify [N] by votes of the k nearest in bank [R, C], with weights exp(cosine / temperature)."""
    found = Index(bank, torch.arange(len(bank))).search(queries, k)
    labels = bank_labels[found.ids]
    num_classes = int(bank_labels.max()) + 1
    return vote(found.similarities, labels, (k,), num_classes=num_classes, temperature=temperature)[k][:, 0]


def box_miou(sam: Any, count: int, seed: int = 0) -> Scores:
    """Measure mean IoU in percent over all objects of the first `count` val scenes, prompted by true boxes.

    The mask with the highest predicted IoU is used, at 96 px. `filled_box` is the score of filled boxes as
    masks; `small` and `large` split the objects at 25 x 25 visible pixels.
    """
    ious, fills, areas = (torch.cat(parts) for parts in zip(*_box_ious(sam, count, seed), strict=True))
    small = areas < _SMALL
    return {
        "box_miou": 100 * float(ious.mean()),
        "filled_box": 100 * float(fills.mean()),
        "small": 100 * float(ious[small].mean()),
        "large": 100 * float(ious[~small].mean()),
    }


def _box_ious(sam: Any, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, count, _CHUNK):
        scenes = [
            render(i, split="val", seed=seed, size=SIZE) for i in range(start, min(start + _CHUNK, count))
        ]
        which = torch.tensor([row for row, scene in enumerate(scenes) for _ in scene.objects])
        boxes = torch.tensor([item.box for scene in scenes for item in scene.objects]).float()
        wanted = torch.stack([mask for scene in scenes for mask in _masks(scene)])
        with torch.no_grad():
            drawn = _draw(sam, scenes, which, boxes)
        yield _iou(drawn, wanted), _iou(_filled(boxes), wanted), wanted.sum(dim=(1, 2))


def _masks(scene: Scene) -> Iterator[Tensor]:
    for number in range(1, len(scene.objects) + 1):
        yield torch.from_numpy(scene.instances == number)


def _draw(sam: Any, scenes: Sequence[Scene], which: Tensor, boxes: Tensor) -> Tensor:
    pixels = torch.stack([torch.from_numpy(scene.image) for scene in scenes]).float() / 255
    pixels = 255 * resize_images(pixels, (SIDE, SIDE))
    embeddings = sam.image_encoder((pixels - sam.pixel_mean) / sam.pixel_std)
    logits, quality = decode(sam, embeddings, which, boxes=boxes * (SIDE / SIZE))
    best = logits[torch.arange(len(logits)), quality.argmax(dim=1)][:, None]
    return F.interpolate(best, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0] > 0


def _filled(boxes: Tensor) -> Tensor:
    """Convert half-open boxes [P, 4] to filled masks [P, 96, 96]."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    line = torch.arange(SIZE)
    across, down = (line >= x0) & (line < x1), (line >= y0) & (line < y1)
    return down[:, :, None] & across[:, None, :]


def _iou(one: Tensor, other: Tensor) -> Tensor:
    return (one & other).sum(dim=(1, 2)) / (one | other).sum(dim=(1, 2)).clamp(min=1)


def _percent(predicted: Tensor, labels: Tensor) -> float:
    return 100 * float((predicted == labels).float().mean())

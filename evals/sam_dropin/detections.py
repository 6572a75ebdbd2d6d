"""Masks for a detector's boxes, scored as COCO average precision by pycocotools."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from evals.core.report import Metric
from radio.errors import DataError, require, shown
from radio.teachers.sam_decoder import SamHead

from .annotations import CocoImage, Instance, note_boxes, read_detections
from .coco import Instances, run_lengths
from .decoding import Predictions, Prepared, masks_by_image

# Letters: H W pixels.

_STATS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
)  # the first six of COCOeval, in its order


@final
class Detections:
    """The images of an instances file with a detector's boxes.

    Args:
        file: COCO results: a list of {image_id, category_id, bbox, score}.
        truth: the ground truth, images without annotations included.

    Raises:
        DataError: not a results file, no detections, or one of an unknown image or category.
    """

    def __init__(self, file: Path, truth: Instances) -> None:
        self.truth = truth
        self.name = f"{file.name} on {truth.name}"
        rows, self._digest = read_detections(file)
        self.scores = tuple(row.score for row in rows)
        found: dict[int, list[Instance]] = {image.number: [] for image in truth.images}
        for row in rows:
            if row.image not in truth.annotated or row.instance.category not in truth.categories:
                raise DataError(
                    f"{shown(file)}: entry {row.instance.number} is of image {row.image} and category "
                    f"{row.instance.category}, and {truth.name} does not have both"
                )
            if row.image in found:  # not excluded by the limit
                found[row.image].append(row.instance)
        images = (p._replace(instances=tuple(found[p.number])) for p in truth.images)
        self.images: tuple[CocoImage, ...] = tuple(p for p in images if p.instances)
        if not self.images:
            raise DataError(f"{file}: holds no detections on the images of {truth.name}")
        self.notes = note_boxes(self.images, "detections")

    @property
    def content(self) -> str:
        """A hash of the images' bytes."""
        return self.truth.content

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the boxes and of the ground truth."""
        return hashlib.sha256(f"{self._digest} {self.truth.fingerprint}".encode()).hexdigest()

    def read(self, image: CocoImage) -> Tensor:
        """Read an image's pixels, uint8 [3, H, W]."""
        return self.truth.read(image)

    def masks(self, image: CocoImage) -> Tensor:
        """Return no masks, [0, H, W]: the ground truth is not used for prediction."""
        return torch.empty(0, *image.size, dtype=torch.bool)


def encode(
    head: SamHead, loaded: Sequence[Prepared], drawn: Predictions, box_batch: int
) -> list[tuple[int, int, str, tuple[int, int], float]]:
    """Encode the masks of a chunk: (image, entry, run lengths, size, predicted IoU) of each detection."""
    library = require("pycocotools.mask", extra="sam")
    found, quality = [], iter(drawn.quality.cpu().tolist())
    for one, piece, masks in masks_by_image(head, loaded, drawn.logits, box_batch):
        planes = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
        for instance, lengths in zip(one.image.instances[piece], library.encode(planes), strict=True):
            counts = lengths["counts"].decode("ascii")
            found.append((one.image.number, instance.number, counts, one.image.size, next(quality)))
    return found


def average_precision(detections: Detections, records: Sequence[tuple[Any, ...]]) -> dict[str, Metric]:
    """Compute COCO's mask AP in percent: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, and by size.

    The detector's scores rank the masks. A size without ground truth is omitted.
    """
    categories = {instance.number: instance.category for p in detections.images for instance in p.instances}
    results = [
        {
            "image_id": image_id,
            "category_id": categories[entry],
            "score": detections.scores[entry],
            "segmentation": {"size": list(size), "counts": counts},
        }
        for image_id, entry, counts, size, _ in records
    ]
    library = require("pycocotools.cocoeval", extra="sam")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth = _truth(detections.truth)
        judge = library.COCOeval(truth, truth.loadRes(results), "segm")
        judge.params.imgIds = [image.number for image in detections.truth.images]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {
        name: Metric(value=100 * float(value))
        for name, value in zip(_STATS, judge.stats[: len(_STATS)], strict=True)
        if value >= 0
    }


def _truth(truth: Instances) -> Any:
    """Index the ground truth for pycocotools: all annotations of the images, scored or not.

    They get new ids that start at 1: COCOeval treats an id of 0 as no match.
    """
    images = [truth.annotated[image.number] for image in truth.images]
    owned = [(image, instance) for image in images for instance in image.instances]
    coco = require("pycocotools.coco", extra="sam").COCO()
    coco.dataset = {
        "images": [{"id": p.number, "height": p.size[0], "width": p.size[1]} for p in images],
        "categories": [{"id": number, "name": name} for number, name in truth.categories.items()],
        "annotations": [
            {
                "id": place,
                "image_id": image.number,
                "category_id": instance.category,
                "area": instance.area,
                "iscrowd": int(instance.crowd),
                "segmentation": run_lengths(instance, image.size),
            }
            for place, (image, instance) in enumerate(owned, start=1)
        ],
    }
    coco.createIndex()
    return coco

"""A detector's boxes in, masks out, scored as COCO average precision by pycocotools."""

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

from .annotations import Instance, Picture, note_boxes, read_detections
from .coco import Instances, run_lengths
from .decoding import Drawn, Loaded, masks_by_picture

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
    """The pictures of an instances file with the boxes that a detector found on them.

    Args:
        file: COCO results: a list of {image_id, category_id, bbox, score}.
        truth: what they are scored against, pictures without annotations included.

    Raises:
        DataError: not such a file, no detections, or one of a picture or category that is not there.
    """

    def __init__(self, file: Path, truth: Instances) -> None:
        self.truth = truth
        self.name = f"{file.name} on {truth.name}"
        rows, self._digest = read_detections(file)
        self.scores = tuple(row.score for row in rows)
        found: dict[int, list[Instance]] = {picture.number: [] for picture in truth.pictures}
        for row in rows:
            if row.image not in truth.annotated or row.instance.category not in truth.categories:
                raise DataError(
                    f"{shown(file)}: entry {row.instance.number} is of picture {row.image} and category "
                    f"{row.instance.category}, and {truth.name} does not have both"
                )
            if row.image in found:  # not left out by the limit
                found[row.image].append(row.instance)
        pictures = (p._replace(instances=tuple(found[p.number])) for p in truth.pictures)
        self.pictures: tuple[Picture, ...] = tuple(p for p in pictures if p.instances)
        if not self.pictures:
            raise DataError(f"{file}: holds no detections on the pictures of {truth.name}")
        self.notes = note_boxes(self.pictures, "detections")

    @property
    def content(self) -> str:
        """A hash of the pictures' bytes."""
        return self.truth.content

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the boxes and of the ground truth."""
        return hashlib.sha256(f"{self._digest} {self.truth.fingerprint}".encode()).hexdigest()

    def read(self, picture: Picture) -> Tensor:
        """The pixels, uint8 [3, H, W]."""
        return self.truth.read(picture)

    def masks(self, picture: Picture) -> Tensor:
        """Nothing: the truth is not looked at while drawing."""
        return torch.empty(0, *picture.size, dtype=torch.bool)


def encode(
    head: SamHead, loaded: Sequence[Loaded], drawn: Drawn, box_batch: int
) -> list[tuple[int, int, str, tuple[int, int], float]]:
    """(picture, entry, run lengths, size, predicted IoU) of each detection of a chunk."""
    library = require("pycocotools.mask", extra="sam")
    found, quality = [], iter(drawn.quality.cpu().tolist())
    for one, piece, masks in masks_by_picture(head, loaded, drawn.logits, box_batch):
        planes = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
        for instance, lengths in zip(one.picture.instances[piece], library.encode(planes), strict=True):
            counts = lengths["counts"].decode("ascii")
            found.append((one.picture.number, instance.number, counts, one.picture.size, next(quality)))
    return found


def average_precision(detections: Detections, records: Sequence[tuple[Any, ...]]) -> dict[str, Metric]:
    """COCO's mask AP in percent: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, and by size.

    The detector's scores rank the masks. A size without ground truth is left out."""
    categories = {instance.number: instance.category for p in detections.pictures for instance in p.instances}
    results = [
        {
            "image_id": image,
            "category_id": categories[entry],
            "score": detections.scores[entry],
            "segmentation": {"size": list(size), "counts": counts},
        }
        for image, entry, counts, size, _ in records
    ]
    library = require("pycocotools.cocoeval", extra="sam")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth = _truth(detections.truth)
        judge = library.COCOeval(truth, truth.loadRes(results), "segm")
        judge.params.imgIds = [picture.number for picture in detections.truth.pictures]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {
        name: Metric(value=100 * float(value))
        for name, value in zip(_STATS, judge.stats[: len(_STATS)], strict=True)
        if value >= 0
    }


def _truth(truth: Instances) -> Any:
    """Index the ground truth for pycocotools: all annotations of the pictures, scored or not.

    They have ids of their own, from 1 on: to COCOeval an id of 0 is no match.
    """
    pictures = [truth.annotated[picture.number] for picture in truth.pictures]
    owned = [(picture, instance) for picture in pictures for instance in picture.instances]
    coco = require("pycocotools.coco", extra="sam").COCO()
    coco.dataset = {
        "images": [{"id": p.number, "height": p.size[0], "width": p.size[1]} for p in pictures],
        "categories": [{"id": number, "name": name} for number, name in truth.categories.items()],
        "annotations": [
            {
                "id": place,
                "image_id": picture.number,
                "category_id": instance.category,
                "area": instance.area,
                "iscrowd": int(instance.crowd),
                "segmentation": run_lengths(instance, picture.size),
            }
            for place, (picture, instance) in enumerate(owned, start=1)
        ],
    }
    coco.createIndex()
    return coco

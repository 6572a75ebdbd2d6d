"""Average precision of the masks drawn from a detector's boxes, by the rules of COCO and of LVIS."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.core.blocks import Lines
from evals.core.report import Metric
from radio.errors import require

from . import threshold_text
from .data import LVIS_DETECTIONS, Detections, Instances, run_lengths
from .prediction import EncodedMask

# Letters: T IoU thresholds, R recalls, A sizes, K categories.

_MOST_PER_CATEGORY = 100  # detections of an image that count in COCO
_THRESHOLDS = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # of IoU 0.50, 0.55, ..., 0.95
_SIZES = ("ap_small", "ap_medium", "ap_large")  # COCOeval's areas 1 to 3; area 0 is all
_FREQUENCIES = {"r": "ap_rare", "c": "ap_common", "f": "ap_frequent"}


def average_precision(
    detections: Detections, masks: Sequence[EncodedMask], thresholds: Sequence[float] = ()
) -> dict[str, Metric]:
    """Compute mask AP in percent: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, and by size.

    The detector's scores rank the masks. Images of LVIS (Gupta et al. 2019) name the categories that they
    were searched for: there a detection of another category does not count, one of a category that is not
    fully annotated counts only if it is right, each image keeps its 300 best, and AP is also given by the
    categories' frequency. What has no ground truth is omitted.

    Args:
        thresholds: also compute AP over the boxes whose score is at least that, as `ap_from_0.3`.
    """
    truth = detections.truth
    truths = _index_truth(truth)
    metrics = _summarise(_precision(truths, detections, masks), truth)
    for least in thresholds:
        kept = [mask for mask in masks if detections.scores[mask.entry] >= least]
        metrics[f"ap_from_{threshold_text(least)}"] = _summarise(_precision(truths, detections, kept), truth)[
            "ap"
        ]
    return metrics


def draw_thresholds(metrics: Mapping[str, Metric], thresholds: Sequence[float]) -> list[Lines]:
    """Draw AP over the lowest score of the boxes, where there are two scores or more."""
    if len(thresholds) < 2:
        return []
    return [
        Lines(
            title="AP over the detector's lowest score",
            x_label="score",
            y_label="AP (%)",
            x=tuple(thresholds),
            y=tuple(metrics[f"ap_from_{threshold_text(least)}"].value for least in thresholds),
            caption="Average precision of the masks of those boxes whose score is at least that.",
        )
    ]


def _precision(
    truths: Any, detections: Detections, masks: Sequence[EncodedMask]
) -> dict[int, NDArray[np.float64]]:
    """Compute each category's precision [T, R, A] by COCOeval; -1 where a size has no ground truth.

    Category by category, each on the images that it concerns: all at once, LVIS's 1,203 categories on its
    20,000 images would take gigabytes.
    """
    library = require("pycocotools.cocoeval", extra="sam")
    images = detections.truth.annotated
    found = _index_found(detections, masks)
    concerned: dict[int, set[int]] = defaultdict(set)
    for annotation in (*truths.anns.values(), *found.anns.values()):
        concerned[annotation["category_id"]].add(annotation["image_id"])
    precision = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        for category, ids in concerned.items():
            scorer = library.COCOeval(truths, found, "segm")
            scorer.params.catIds, scorer.params.imgIds = [category], sorted(ids)
            scorer.params.maxDets = [LVIS_DETECTIONS if detections.truth.is_lvis else _MOST_PER_CATEGORY]
            scorer.evaluate()
            for entry in scorer.evalImgs:
                if entry is not None and category in images[entry["image_id"]].not_exhaustive:
                    entry["dtIgnore"] |= entry["dtMatches"] == 0
            scorer.accumulate()
            precision[category] = scorer.eval["precision"][:, :, 0, :, 0]
    return precision


def _summarise(precision: Mapping[int, NDArray[np.float64]], truth: Instances) -> dict[str, Metric]:
    """Average precision [T, R, A] over IoU thresholds, recalls and the categories with ground truth."""

    def mean(categories: Sequence[int], thresholds: slice, area: int) -> float | None:
        values = [precision[category][thresholds, :, area] for category in categories]
        present = [float(each.mean()) for each in values if (each > -1).all()]
        return 100 * sum(present) / len(present) if present else None

    every = list(precision)
    means = {name: mean(every, chosen, 0) for name, chosen in _THRESHOLDS.items()}
    means |= {name: mean(every, slice(None), area) for area, name in enumerate(_SIZES, start=1)}
    for mark, name in _FREQUENCIES.items():
        of_mark = [category for category in every if truth.frequencies.get(category) == mark]
        means[name] = mean(of_mark, slice(None), 0)
    return {name: Metric(value=value) for name, value in means.items() if value is not None}


def _index_truth(truth: Instances) -> Any:
    """Index the ground truth for pycocotools: all annotations of the images, scored or not.

    They get new ids that start at 1: COCOeval treats an id of 0 as no match.
    """
    images = [truth.annotated[image.id] for image in truth.images]
    instances = [(image, instance) for image in images for instance in image.instances]
    return _index(
        truth,
        [
            {
                "id": id,
                "image_id": image.id,
                "category_id": instance.category,
                "area": instance.area,
                "iscrowd": int(instance.crowd),
                "segmentation": run_lengths(instance, image.size),
            }
            for id, (image, instance) in enumerate(instances, start=1)
        ],
    )


def _index_found(detections: Detections, masks: Sequence[EncodedMask]) -> Any:
    """Index the detections for pycocotools."""
    library = require("pycocotools.mask", extra="sam")
    categories = {each.id: each.category for image in detections.images for each in image.instances}
    found = []
    for mask in masks:
        lengths = {"size": list(mask.size), "counts": mask.counts}
        found.append(
            {
                "id": mask.entry + 1,
                "image_id": mask.image_id,
                "category_id": categories[mask.entry],
                "score": detections.scores[mask.entry],
                "area": float(library.area(lengths)),
                "iscrowd": 0,
                "segmentation": lengths,
            }
        )
    return _index(detections.truth, found)


def _index(truth: Instances, annotations: list[dict[str, Any]]) -> Any:
    images = [truth.annotated[image.id] for image in truth.images]
    coco = require("pycocotools.coco", extra="sam").COCO()
    coco.dataset = {
        "images": [{"id": image.id, "height": image.size[0], "width": image.size[1]} for image in images],
        "categories": [{"id": id, "name": name} for id, name in truth.categories.items()],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco

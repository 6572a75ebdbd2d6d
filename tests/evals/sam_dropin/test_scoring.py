"""Overlaps and buckets against pycocotools and OpenCV."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as library

from evals.sam_dropin.evaluator import category_table, mask_metrics
from evals.sam_dropin.masks import boundaries, fill, overlap, pack
from evals.sam_dropin.prediction import MaskScore

GENERATOR = torch.Generator().manual_seed(0)


def random_masks(count: int, height: int = 37, width: int = 53) -> torch.Tensor:
    """Blobs, an empty one first and a full one last."""
    low = torch.rand(count, 1, 6, 8, generator=GENERATOR)
    masks = torch.nn.functional.interpolate(low, (height, width), mode="bilinear")[:, 0] > 0.55
    masks[0], masks[-1] = False, True
    return masks


def unpack(bits: torch.Tensor, height: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, bitorder="little")[:, :height].astype(bool))


def encode(masks: torch.Tensor) -> list[Any]:
    return list(library.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8))))


def test_overlaps_are_pycocotools() -> None:
    one, other = random_masks(40), random_masks(40)
    ours = overlap(pack(one), pack(other))
    theirs = np.diag(library.iou(encode(one), encode(other), [0] * 40))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    assert ours[0] == 0  # both empty
    assert ours[-1] == 1
    biased = overlap(pack(one), pack(other), 1e-7)
    assert biased[-1] < 1
    np.testing.assert_allclose(biased.numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize("size", [(3, 2), (37, 53), (100, 80), (240, 320), (511, 640)])
def test_boundaries_are_what_erosion_takes_away(size: tuple[int, int]) -> None:
    masks = random_masks(5, *size)
    reach = max(round(0.02 * math.hypot(*size)), 1)
    for ours, mask in zip(boundaries(pack(masks), size), masks.numpy().astype(np.uint8), strict=True):
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=reach)[1:-1, 1:-1]
        assert torch.equal(ours, pack(torch.from_numpy((mask - eroded).astype(bool))[None])[0])


def test_filled_boxes_by_hand() -> None:
    boxes = torch.tensor([[1.0, 0.0, 3.0, 2.0], [-5.0, 1.0, 9.0, 90.0], [0.4, 0.4, 0.6, 0.6], [7, 7, 7, 7]])
    filled = unpack(fill(boxes.double(), (4, 5)), 4)
    assert filled.sum((1, 2)).tolist() == [4, 15, 1, 0]
    assert filled[0, :2, 1:3].all() and filled[1, 1:].all() and filled[2, 0, 0]


def record(image: int, number: int, area: float, iou: float, category: int = 1) -> MaskScore:
    return MaskScore(
        image_id=image,
        annotation_id=number,
        category_id=category,
        area=area,
        crowd=False,
        quality=0.9,
        iou=iou,
        boundary_iou=iou / 2,
        box_iou=0.25,
    )


def test_sizes_by_hand() -> None:
    found = mask_metrics(
        [record(1, 1, 1024, 0.2), record(1, 2, 1024.5, 0.4), record(2, 3, 9216, 0.9), record(2, 4, 0, 0.0)], 0
    )
    values = {name: metric.value for name, metric in found.items()}
    assert values == pytest.approx(
        {
            "miou": 37.5,
            "miou_small": 10.0,
            "miou_medium": 50.0,
            "miou_large": 90.0,
            "boundary_miou": 18.75,
            "filled_box_miou": 25.0,
        }
    )


def test_an_empty_size_is_left_out_and_buckets_are_cocos() -> None:
    """COCO's own bounds, each an area of both sizes that it divides."""
    from pycocotools.cocoeval import Params

    ranges = dict(zip(Params("segm").areaRngLbl, Params("segm").areaRng, strict=True))
    assert "miou_large" not in mask_metrics([record(1, 1, 9215.5, 0.5)], 0)
    areas = [0.0, 10.0, 1023.5, 1024.0, 1024.5, 5000.0, 9215.5, 9216.0, 9216.5, 20000.0]
    found = mask_metrics([record(i, i, area, i / 10) for i, area in enumerate(areas)], 0)
    for name in ("small", "medium", "large"):
        low, high = ranges[name]
        inside = [i / 10 for i, area in enumerate(areas) if low <= area <= high]
        assert found[f"miou_{name}"].value == pytest.approx(100 * sum(inside) / len(inside))


def test_intervals_draw_images_not_instances() -> None:
    """Twenty equal instances on each of two images say no more than one each."""
    few = mask_metrics([record(1, 1, 10, 0.0), record(2, 2, 10, 1.0)], 0)["miou"]
    many = mask_metrics([record(1 + n % 2, n, 10, float(n % 2)) for n in range(40)], 0)["miou"]
    assert (many.low, many.high) == (few.low, few.high) == (0.0, 100.0)


def test_categories_without_instances_have_no_row() -> None:
    table = category_table([record(1, 1, 5, 0.5, 2), record(1, 2, 5, 1.0, 2)], {1: "cat", 2: "dog"})
    assert table.rows == (("dog", 2, 75.0),)

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from evals.sam_dropin.masks import next_clicks


def masks(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2 * count, 1, 5, 6, generator=generator)
    both = torch.nn.functional.interpolate(low, (40, 48), mode="bilinear")[:, 0] > 0.55
    return both[:count], both[count:]


def slow_click(truth: np.ndarray, predictions: np.ndarray) -> tuple[tuple[int, int], int]:
    """One object at a time, the image padded with outside."""
    missed, surplus = truth & ~predictions, predictions & ~truth
    label = int(missed.sum() >= surplus.sum())
    region = missed if label else surplus
    if not region.any():
        region = truth
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return (int(column), int(row)), label


def test_clicks_equal_one_object_at_a_time() -> None:
    truth, predictions = masks()
    points, labels = next_clicks(truth, predictions)
    for row in range(len(truth)):
        (x, y), label = slow_click(truth[row].numpy(), predictions[row].numpy())
        assert points[row].tolist() == [x, y]
        assert labels[row] == label
    assert set(labels.tolist()) == {0, 1}


def test_the_first_click_is_inside_and_positive() -> None:
    truth, _ = masks()
    points, labels = next_clicks(truth, None)
    assert labels.tolist() == [1] * len(truth)
    assert all(truth[row, int(y), int(x)] for row, (x, y) in enumerate(points.tolist()))


def test_a_perfect_and_an_empty_object_are_clicked_somewhere() -> None:
    truth, _ = masks(2)
    truth[1] = False
    points, labels = next_clicks(truth, truth.clone())
    assert truth[0, int(points[0, 1]), int(points[0, 0])]
    assert points[1].tolist() == [0, 0]
    assert labels.tolist() == [1, 1]

"""The detector makes the faults that its rates say; their shares over many scenes are the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from radio.scenes import CLASSES, Scene, render
from radio.scenes.detector import Box, search

COUNT = 400
SCENES = [render(index, split="val", seed=3, size=32) for index in range(COUNT)]
FOUND = [search(scene, index, split="val", seed=3) for index, scene in enumerate(SCENES)]


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def labels(scene: Scene) -> list[int]:
    return [item.colour * 10 + item.shape for item in scene.objects]


def test_a_scene_is_searched_for_what_is_there_and_a_little_more() -> None:
    for scene, found in zip(SCENES, FOUND, strict=True):
        assert len(set(found.absent)) == 6 and not set(found.absent) & set(labels(scene))
        assert found.absent == tuple(sorted(found.absent)) and set(found.absent) < set(range(len(CLASSES)))
        assert set(found.not_exhaustive) <= set(labels(scene)) and len(found.not_exhaustive) < 2
    assert np.mean([len(found.not_exhaustive) for found in FOUND]) == pytest.approx(0.2, abs=0.06)


def test_a_search_is_a_function_of_its_scene() -> None:
    assert search(SCENES[7], 7, split="val", seed=3) == FOUND[7]
    assert search(SCENES[7], 8, split="val", seed=3) != FOUND[7]
    assert search(SCENES[7], 7, split="train", seed=3) != FOUND[7]
    assert search(SCENES[7], 7, split="val", seed=4) != FOUND[7]


def test_objects_are_missed_and_confused_and_boxes_moved_as_often_as_said() -> None:
    def best(box: Box, scene: Scene) -> float:
        return max(iou(box.corners, item.box) for item in scene.objects)

    pairs = [(box, scene) for scene, found in zip(SCENES, FOUND, strict=True) for box in found.boxes]
    near = [(box, scene) for box, scene in pairs if best(box, scene) > 0.6]
    num_objects = sum(len(scene.objects) for scene in SCENES)
    assert len(near) / num_objects == pytest.approx(0.9, abs=0.04)
    right = [box.label in labels(scene) for box, scene in near]
    assert np.mean(right) == pytest.approx(0.9, abs=0.03)
    assert (len(pairs) - len(near)) / COUNT == pytest.approx(1.0, abs=0.15)
    scores = [
        np.mean([box.score for box, _ in near]),
        np.mean([b.score for b, s in pairs if best(b, s) < 0.3]),
    ]
    assert scores[0] > 0.7 > 0.35 > scores[1]
    for box, _ in pairs:
        x0, y0, x1, y1 = box.corners
        assert 0 <= x0 <= x1 - 0.99 and x1 <= 32 and 0 <= y0 <= y1 - 0.99 and y1 <= 32
        assert 0 < box.score < 1

"""A detector with known faults, and which categories each scene is searched for, as LVIS's annotators were.

All rates are ours. The detector misses some objects, misplaces boxes, confuses classes, and finds things that
are not there, mostly with low scores: a lower threshold finds more of both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .drawing import SHAPES
from .world import CLASSES, Scene, SceneObject, Split, generator

_STREAM = 1 << 32  # of random numbers, above those of all further views
_ABSENT = 6  # classes of a scene that are looked for in vain
_NOT_EXHAUSTIVE = 0.2  # share of scenes with a class of which not all objects need be annotated
_MISSED, _CONFUSED = 0.1, 0.1  # shares of objects
_SHIFT = 0.05  # sd of each edge of a box, in its side lengths
_FALSE = 1.0  # mean number of boxes with nothing inside


class Box(NamedTuple):
    """A detected box."""

    label: int
    corners: tuple[float, float, float, float]  # x0 y0 x1 y1 in pixels
    score: float  # in [0, 1]


class Search(NamedTuple):
    """What a scene was searched for, and what the detector found."""

    absent: tuple[int, ...]  # classes that are not there, ascending
    not_exhaustive: tuple[int, ...]  # one class that is there, or none
    boxes: tuple[Box, ...]


def label_of_object(item: SceneObject) -> int:
    """Return an object's class."""
    return item.colour * len(SHAPES) + item.shape


def search(scene: Scene, index: int, *, split: Split, seed: int) -> Search:
    """Search a scene; the outcome is a function of its index, split and seed."""
    draws = generator(index, split=split, seed=seed, stream=_STREAM)
    labels = [label_of_object(item) for item in scene.objects]
    there = sorted(set(labels))
    others = draws.permutation([label for label in range(len(CLASSES)) if label not in there])
    loose = int(draws.choice(there))
    exhaustive = draws.random() >= _NOT_EXHAUSTIVE
    height, width = scene.instances.shape
    boxes = []
    for item, label in zip(scene.objects, labels, strict=True):
        found, right, noise = draws.random() >= _MISSED, draws.random() >= _CONFUSED, draws.normal(0, 0.1)
        other = int(draws.integers(1, len(CLASSES)))
        x0, y0, x1, y1 = item.box
        moved = np.array(item.box) + draws.normal(0, _SHIFT, 4) * [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
        if not found:
            continue
        corners = _inside(moved.tolist(), height, width)
        score = 0.35 + 0.6 * _overlap(corners, item.box) + noise - (0.0 if right else 0.3)
        boxes.append(Box(label if right else (label + other) % len(CLASSES), corners, _rounded(score)))
    for _ in range(int(draws.poisson(_FALSE))):
        (x, y), side = draws.random(2), draws.uniform(0.15, 0.5)
        corners = _inside([x * width, y * height, (x + side) * width, (y + side) * height], height, width)
        boxes.append(Box(int(draws.integers(len(CLASSES))), corners, _rounded(draws.uniform(0, 0.5))))
    return Search(
        absent=tuple(sorted(others[:_ABSENT].tolist())),
        not_exhaustive=() if exhaustive else (loose,),
        boxes=tuple(boxes),
    )


def _inside(corners: list[float], height: int, width: int) -> tuple[float, float, float, float]:
    """Clip a box to the image, to at least a pixel, in hundredths of pixels."""
    x0, y0, x1, y1 = corners
    x0, y0 = min(max(x0, 0.0), width - 1.0), min(max(y0, 0.0), height - 1.0)
    x1, y1 = min(max(x1, x0 + 1), float(width)), min(max(y1, y0 + 1), float(height))
    return round(x0, 2), round(y0, 2), round(x1, 2), round(y1, 2)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Compute the IoU of two boxes."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across / (sum(areas) - across)


def _rounded(score: float) -> float:
    return round(min(max(float(score), 0.01), 0.99), 4)

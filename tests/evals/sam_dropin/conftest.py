"""A small COCO data set with everything that real ones hold, and SAM's own predictor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as library


def run_lengths(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A compressed run-length segmentation as JSON holds it."""
    found = library.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def annotation(number: int, image: int, mask: np.ndarray[Any, Any], **changes: Any) -> dict[str, Any]:
    """An annotation of a mask, with its own box and area."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [0, 0, 0, 0]
    if rows.size:
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1 + number % 2,
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": run_lengths(mask),
        **changes,
    }


SIZES = ((60, 80), (90, 50), (64, 64), (40, 100), (48, 48))


def blob(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """A random ellipse."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    y, x = generator.uniform(0.25, 0.75, 2) * size
    a, b = generator.uniform(0.1, 0.35, 2) * size
    return np.asarray(((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1)


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """An instances JSON of five images (the last without annotations), and their folder.

    Image 1: three ellipses. 2: a polygon, and a crowd with uncompressed run lengths. 3: a zero-area mask
    and a box that reaches beyond the image. 4: two ellipses.
    """
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for number, size in enumerate(SIZES, start=1):
        pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
    for number in (1, 2, 3):
        annotations.append(annotation(number, 1, blob(SIZES[0], generator)))
    triangle = [5.0, 5.0, 40.0, 10.0, 20.0, 70.0]
    annotations.append(
        {
            **annotation(4, 2, np.zeros(SIZES[1], dtype=bool)),
            "segmentation": [triangle],
            "bbox": [5, 5, 35, 65],
            "area": 1100.5,
        }
    )
    crowd = blob(SIZES[1], generator)
    ends = np.flatnonzero(np.diff(np.concatenate([[0], crowd.T.ravel().astype(int), [0]])))
    counts = np.diff(np.concatenate([[0], ends, [crowd.size]])).tolist()
    lengths = {"size": list(crowd.shape), "counts": counts}
    annotations.append(annotation(5, 2, crowd, iscrowd=1, segmentation=lengths))
    annotations.append(annotation(6, 3, np.zeros(SIZES[2], dtype=bool)))
    annotations.append(annotation(7, 3, blob(SIZES[2], generator), bbox=[-20, 30, 200, 60]))
    for number in (8, 9):
        annotations.append(annotation(number, 4, blob(SIZES[3], generator)))
    categories = [{"id": 1, "name": "even"}, {"id": 2, "name": "odd"}, {"id": 3, "name": "unused"}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, folder


@pytest.fixture
def change(world: tuple[Path, Path]) -> Callable[[Callable[[Any], Any]], None]:
    """Edits the JSON."""

    def edit(how: Callable[[Any], Any]) -> None:
        data = json.loads(world[0].read_text())
        how(data)
        world[0].write_text(json.dumps(data))

    return edit

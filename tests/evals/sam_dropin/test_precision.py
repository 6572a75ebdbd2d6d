"""Average precision against a slow loop over LVIS's published rule, and against pycocotools for COCO's."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as library
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evals.sam_dropin.data import Detections, open_detections, open_instances
from evals.sam_dropin.precision import average_precision, draw_thresholds
from evals.sam_dropin.prediction import EncodedMask
from radio.errors import DataError

from .conftest import annotation, blob, run_lengths

Masks = list[np.ndarray[Any, Any]]

SIZE = (60, 80)
NUM_IMAGES, NUM_CATEGORIES = 12, 4


def moved(mask: np.ndarray[Any, Any], generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """The mask a few pixels away, so that its overlap with the truth is anything."""
    return np.roll(mask, generator.integers(-6, 7, 2), axis=(0, 1))


@pytest.fixture
def found(tmp_path: Path) -> tuple[Detections, list[EncodedMask], dict[str, Any], Masks]:
    """Detections with scores that repeat, near to the objects and elsewhere; the file of LVIS, and masks."""
    return make(tmp_path, lvis=True)


def make(folder: Path, *, lvis: bool) -> tuple[Detections, list[EncodedMask], dict[str, Any], Masks]:
    generator = np.random.default_rng(5)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for category in range(1, NUM_CATEGORIES + 1):
        data["categories"].append({"id": category, "name": f"c{category}", "frequency": "rcff"[category - 1]})
    entries, masks = [], []
    for image in range(1, NUM_IMAGES + 1):
        Image.new("RGB", SIZE[::-1]).save(folder / f"{image}.png")
        data["images"].append({"id": image, "file_name": f"{image}.png", "height": SIZE[0], "width": SIZE[1]})
        there = set()
        for _ in range(3):
            mask, category = blob(SIZE, generator), int(generator.integers(1, NUM_CATEGORIES + 1))
            there.add(category)
            number = len(data["annotations"]) + 1
            data["annotations"].append(annotation(number, image, mask, category_id=category))
            for candidate in (moved(mask, generator), moved(mask, generator), blob(SIZE, generator)):
                kind = (
                    category if generator.random() < 0.7 else int(generator.integers(1, NUM_CATEGORIES + 1))
                )
                masks.append(candidate)
                entries.append(
                    {"image_id": image, "category_id": kind, "bbox": [1, 1, 9, 9]}
                    | {"score": round(float(generator.random()), 1)}
                )
        if lvis:
            rest = sorted(set(range(1, NUM_CATEGORIES + 1)) - there)
            data["images"][-1] |= {
                "neg_category_ids": rest[:1],
                "not_exhaustive_category_ids": sorted(there)[: image % 2],
            }
    (folder / "truth.json").write_text(json.dumps(data))
    (folder / "found.json").write_text(json.dumps(entries))
    truth = open_instances(
        folder / "truth.json", folder, limit=None, crowds=True, smallest_area=0, memo=None, empty=True
    )
    detections = open_detections(folder / "found.json", truth)
    kept = {instance.id for image in detections.images for instance in image.instances}
    encoded = [
        EncodedMask(
            image_id=entry["image_id"],
            entry=number,
            size=SIZE,
            counts=run_lengths(mask)["counts"],
            quality=0.5,
        )
        for number, (entry, mask) in enumerate(zip(entries, masks, strict=True))
        if number in kept
    ]
    return detections, encoded, data | {"found": entries}, masks


def slow_precision(data: dict[str, Any], masks: Masks, truth: Masks, category: int, least: float) -> float:
    """AP of a category at one IoU, by LVIS's rule, object by object."""
    images = {image["id"]: image for image in data["images"]}
    marks: list[tuple[float, bool]] = []
    count = sum(each["category_id"] == category for each in data["annotations"])
    by_image: dict[int, list[int]] = defaultdict(list)
    for number, entry in enumerate(data["found"]):
        by_image[entry["image_id"]].append(number)
    for id, numbers in by_image.items():
        objects = [
            place
            for place, each in enumerate(data["annotations"])
            if (each["image_id"], each["category_id"]) == (id, category)
        ]
        if not objects and category not in images[id]["neg_category_ids"]:
            continue
        taken: set[int] = set()
        for number in sorted(numbers, key=lambda number: -data["found"][number]["score"]):
            if data["found"][number]["category_id"] != category:
                continue
            best, match = least, None
            for place in objects:
                both = (masks[number] & truth[place]).sum() / (masks[number] | truth[place]).sum()
                if place not in taken and both >= best:
                    best, match = both, place
            if match is not None:
                taken.add(match)
            elif category in images[id]["not_exhaustive_category_ids"]:
                continue
            marks.append((data["found"][number]["score"], match is not None))
    marks.sort(key=lambda mark: -mark[0])
    right = np.cumsum([good for _, good in marks])
    precision, recall = right / np.arange(1, len(marks) + 1), right / count
    reached = [precision[recall >= level - 1e-12] for level in np.linspace(0, 1, 101)]
    return float(np.mean([each.max() if len(each) else 0.0 for each in reached]))


def test_lvis_by_a_slow_loop(
    found: tuple[Detections, list[EncodedMask], dict[str, Any], Masks],
) -> None:
    detections, encoded, data, masks = found
    truth = [library.decode(each["segmentation"]).astype(bool) for each in data["annotations"]]
    metrics = average_precision(detections, encoded)
    levels = np.linspace(0.5, 0.95, 10)
    of = {
        category: [slow_precision(data, masks, truth, category, level) for level in levels]
        for category in range(1, NUM_CATEGORIES + 1)
    }
    every = np.array(list(of.values()))
    assert metrics["ap"].value == pytest.approx(100 * every.mean(), abs=1e-6)
    assert metrics["ap50"].value == pytest.approx(100 * every[:, 0].mean(), abs=1e-6)
    assert metrics["ap75"].value == pytest.approx(100 * every[:, 5].mean(), abs=1e-6)
    assert metrics["ap_rare"].value == pytest.approx(100 * every[0].mean(), abs=1e-6)
    assert metrics["ap_common"].value == pytest.approx(100 * every[1].mean(), abs=1e-6)
    assert metrics["ap_frequent"].value == pytest.approx(100 * every[2:].mean(), abs=1e-6)
    assert 10 < metrics["ap"].value < 90


def test_coco_by_pycocotools_and_from_a_score_on(tmp_path: Path) -> None:
    detections, encoded, data, _ = make(tmp_path, lvis=False)
    metrics = average_precision(detections, encoded, (0.3, 0.8, 2.0))
    truth = COCO(str(tmp_path / "truth.json"))
    for name, least in (("ap", 0.0), ("ap_from_0.3", 0.3), ("ap_from_0.8", 0.8)):
        results = [
            {
                **{key: data["found"][mask.entry][key] for key in ("image_id", "category_id", "score")},
                "segmentation": {"size": list(SIZE), "counts": mask.counts},
            }
            for mask in encoded
            if data["found"][mask.entry]["score"] >= least
        ]
        scorer = COCOeval(truth, truth.loadRes(results), "segm")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        assert metrics[name].value == pytest.approx(100 * scorer.stats[0], abs=1e-9)
        if not least:
            for stat, value in zip(("ap50", "ap75", "ap_small", "ap_medium"), scorer.stats[1:5], strict=True):
                assert metrics[stat].value == pytest.approx(100 * value, abs=1e-9)
    assert metrics["ap_from_2"].value == 0  # no box is left, and there are objects
    assert "ap_rare" not in metrics
    (curve,) = draw_thresholds(metrics, (0.3, 0.8))
    assert curve.y == (metrics["ap_from_0.3"].value, metrics["ap_from_0.8"].value)


def kept_entries(detections: Detections) -> list[int]:
    """The entries of the detector's file that are kept, in order."""
    return [instance.id for image in detections.images for instance in image.instances]


def test_an_image_of_lvis_keeps_only_its_best(
    found: tuple[Detections, list[EncodedMask], dict[str, Any], Masks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit counts all categories of an image together; of equal scores the first in the file stays."""
    detections, encoded, data, _ = found
    rows = data["found"]
    by_image: dict[int, list[int]] = defaultdict(list)
    for entry in sorted(range(len(rows)), key=lambda entry: (-rows[entry]["score"], entry)):
        by_image[rows[entry]["image_id"]].append(entry)
    best = {entry for ranked in by_image.values() for entry in ranked[:4]}
    monkeypatch.setattr("evals.sam_dropin.data.LVIS_DETECTIONS", 4)
    limited = open_detections(tmp_path / "found.json", detections.truth)
    # A box of a category that was not searched for takes one of the places.
    assert kept_entries(limited) == [entry for entry in kept_entries(detections) if entry in best]
    assert max(len(image.instances) for image in limited.images) == 4
    assert min(len(image.instances) for image in limited.images) < 4
    left_out = len(rows) - len(kept_entries(limited))
    assert limited.notes[0].startswith(f"{left_out} of {len(rows)} detections cannot count by LVIS's rule")
    assert limited.fingerprint != detections.fingerprint
    kept = [mask for mask in encoded if mask.entry in best]
    assert average_precision(limited, kept) == average_precision(detections, kept)
    assert average_precision(limited, kept) != average_precision(detections, encoded)


def test_a_category_that_was_not_searched_for_is_left_out(
    found: tuple[Detections, list[EncodedMask], dict[str, Any], Masks],
) -> None:
    """A detection of a category that the image was not searched for counts neither way."""
    detections, _, data, _ = found
    images = {image["id"]: image for image in data["images"]}

    def counts(entry: dict[str, Any]) -> bool:
        searched = detections.truth.annotated[entry["image_id"]].searched
        assert searched is not None
        assert set(images[entry["image_id"]]["neg_category_ids"]) <= searched
        return entry["category_id"] in searched

    kept = [number for number, entry in enumerate(data["found"]) if counts(entry)]
    assert kept_entries(detections) == kept
    assert 0 < len(kept) < len(data["found"])


def test_boxes_of_lvis_of_which_none_can_count_are_one_error(
    found: tuple[Detections, list[EncodedMask], dict[str, Any], Masks], tmp_path: Path
) -> None:
    detections, _, data, _ = found
    kept = set(kept_entries(detections))
    rest = [entry for number, entry in enumerate(data["found"]) if number not in kept]
    (tmp_path / "rest.json").write_text(json.dumps(rest))
    with pytest.raises(DataError, match=f"none of its {len(rest)} detections"):
        open_detections(tmp_path / "rest.json", detections.truth)


def test_boxes_of_coco_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.sam_dropin.data.LVIS_DETECTIONS", 4)
    detections, _, data, _ = make(tmp_path, lvis=False)
    assert kept_entries(detections) == list(range(len(data["found"])))
    assert not detections.notes

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from evals.sam_dropin.data import Instances, open_instances
from radio.errors import DataError


def opened(world: tuple[Path, Path], **changes: Any) -> Instances:
    settings: dict[str, Any] = {"limit": None, "crowds": True, "smallest_area": 0.0, "memo": None}
    return open_instances(*world, **{**settings, **changes})


def test_every_annotation_is_there_in_the_order_of_the_images(world: tuple[Path, Path]) -> None:
    data = opened(world)
    assert [image.id for image in data.images] == [1, 2, 3, 4]  # the fifth has none
    assert data.count == 9
    assert [i.id for image in data.images for i in image.instances] == list(range(1, 10))
    assert data.images[1].instances[0].box == (5.0, 5.0, 40.0, 70.0)
    assert data.images[2].instances[1].box == (-20.0, 30.0, 180.0, 90.0)
    assert data.categories == {1: "even", 2: "odd", 3: "unused"}


def test_masks_are_pycocotools(world: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = opened(world)
    assert capsys.readouterr().out == ""
    theirs = COCO(str(world[0]))
    for image in data.images:
        for mask, instance in zip(data.masks(image), image.instances, strict=True):
            np.testing.assert_array_equal(mask.numpy(), theirs.annToMask(theirs.anns[instance.id]))


def test_crowds_and_small_ones_can_be_left_out(world: tuple[Path, Path]) -> None:
    assert opened(world, crowds=False).count == 8
    assert opened(world, smallest_area=1.0).count == 8
    assert [p.id for p in opened(world, limit=2).images] == [1, 3]
    with pytest.raises(DataError, match="a limit of 0 leaves no images; give 1 or more"):
        opened(world, limit=0)
    assert len({opened(world, **c).fingerprint for c in ({}, {"crowds": False}, {"limit": 2})}) == 3
    assert opened(world).fingerprint == opened(world).fingerprint


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            lambda d: d.pop("images"),
            "not COCO instances: images: field required",
        ),
        (
            lambda d: d["annotations"][2].pop("bbox"),
            r"not COCO instances: annotations\[2\]\.bbox: field required",
        ),
        (
            lambda d: d["annotations"][2].pop("segmentation"),
            r"annotations\[2\]\.segmentation: field required",
        ),
        (
            lambda d: d["annotations"][2].update(bbox=[1, 2, 3]),
            r"not COCO instances: annotations\[2\]\.bbox: list",
        ),
        (lambda d: d["annotations"].clear(), "none of its 5 images has an annotation to score"),
        (
            lambda d: [image.update(file_name=f"gone{image['id']}.png") for image in d["images"][1:]],
            "3 of the 4 images of instances.json are not there: gone2.png",
        ),
    ],
)
def test_bad_files(world: tuple[Path, Path], change: Callable, how: Callable, said: str) -> None:
    change(how)
    with pytest.raises(DataError, match=said):
        opened(world)


def test_a_folder_that_is_none(world: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in (tmp_path / "no", world[0]):
        with pytest.raises(
            DataError, match=r"no such folder; give the one that holds the images of instances\.js"
        ):
            opened((world[0], folder))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.json: no such file"):
        opened((tmp_path / "no.json", tmp_path))
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"half\.json: is not JSON"):
        opened((tmp_path / "half.json", tmp_path))


@pytest.mark.parametrize(
    ("number", "segmentation", "said"),
    [
        (3, [["x"] * 6], "annotation 4 has a polygon that is not three or more points x y"),
        (3, [[1, 1, 5, 5]], "annotation 4 has a polygon that is not three or more points x y"),
        (3, [], "annotation 4 has a segmentation that is neither polygons nor run lengths"),
        (3, {"counts": "abc"}, "annotation 4 has a segmentation that is neither polygons nor run lengths"),
        (
            4,
            {"size": [9, 9], "counts": [81]},
            "annotation 5 has a segmentation of 9x9 px, and its image has 90x50",
        ),
        (
            4,
            {"size": [90, 50], "counts": [81]},
            "annotation 5 has run lengths of 81 pixels, and its image has 4500",
        ),
    ],
)
def test_bad_segmentations_are_named_before_any_work(
    world: tuple[Path, Path], change: Callable, number: int, segmentation: Any, said: str
) -> None:
    change(lambda d: d["annotations"][number].update(segmentation=segmentation))
    with pytest.raises(DataError, match=said):
        opened(world)


def test_images_are_read_and_checked(world: tuple[Path, Path]) -> None:
    data = opened(world)
    pixels = np.asarray(Image.open(world[1] / "2.png")).transpose(2, 0, 1)
    assert torch.equal(data.read(data.images[1]), torch.from_numpy(pixels.copy()))
    # Replaced since they were checked, by files of the same length.
    lengths = [(world[1] / name).stat().st_size for name in ("1.png", "2.png")]
    Image.new("RGB", (7, 7)).save(world[1] / "2.png")
    (world[1] / "2.png").write_bytes((world[1] / "2.png").read_bytes().ljust(lengths[1]))
    (world[1] / "1.png").write_bytes(b"nothing".ljust(lengths[0]))
    with pytest.raises(
        DataError, match=r"2.png is \[7, 7\] \(height, width\), and instances says \[90, 50\]"
    ):
        data.read(data.images[1])
    with pytest.raises(DataError, match=r"1\.png: not an image"):
        data.read(data.images[0])

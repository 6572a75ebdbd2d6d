"""NYU's layout, right and with one thing wrong each; crops in which image and depth move together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.depth.data import (
    EIGEN_CROP,
    TRAIN_CROP,
    NyuCrops,
    NyuImages,
    augment,
    index_at,
    list_nyu,
    nyu_split,
    scene_split,
)
from radio.errors import DataError, MissingDataError
from radio.scenes import depth, render

from .conftest import write_nyu


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_the_lists_name_images_and_depths(tmp_path: Path, nyu: Path) -> None:
    train, test = list_nyu(nyu, "train"), list_nyu(nyu, "test")
    assert [pair.key for pair in train] == [f"bath_train/rgb_{n:05d}.jpg" for n in range(3)]
    assert test[1].depth == nyu / "bath_test" / "sync_depth_00001.png"
    split = nyu_split(nyu, "test", limit=1, memo=tmp_path / "memo")
    assert len(split) == 1 and split.images.name == "nyu/test"
    stored = np.asarray(Image.open(test[0].depth))
    assert np.array_equal(split.read_depth(0).numpy(), (stored / 1000).astype(np.float32))


def test_the_folders_of_bts_and_adabins_are_found(tmp_path: Path) -> None:
    root = write_nyu(tmp_path / "other", base="sync")
    assert list_nyu(root, "train")[0].image.is_relative_to(root / "sync")
    assert list_nyu(root, "test")[0].image.is_relative_to(root / "official_splits" / "test")


def test_the_fingerprint_follows_the_depths_too(tmp_path: Path, nyu: Path) -> None:
    first = nyu_split(nyu, "train", limit=None, memo=tmp_path / "memo").fingerprint
    assert nyu_split(nyu, "train", limit=None, memo=tmp_path / "other").fingerprint == first
    path = nyu / "bath_train" / "sync_depth_00002.png"
    Image.fromarray(np.full((480, 640), 7, dtype=np.uint16)).save(path)
    assert nyu_split(nyu, "train", limit=None, memo=tmp_path / "memo").fingerprint != first


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda root: (root / "nyu_test.txt").unlink(),
            MissingDataError,
            "nyu_test.txt: no such file; wanted a folder",
        ),
        (lambda root: (root / "nyu_test.txt").write_text("\n"), DataError, "nyu_test.txt: lists no images"),
        (
            lambda root: edit(root / "nyu_test.txt", lambda text: text.replace(" bath", "-bath", 1)),
            MissingDataError,
            r"rgb_00000.jpg-bath_test/.*: no such file, and nyu_test.txt names it",
        ),
        (
            lambda root: edit(root / "nyu_test.txt", lambda text: "only_an_image.jpg\n" + text),
            DataError,
            "line 1 is 'only_an_image.jpg'; wanted an image, its depth and the focal length",
        ),
        (
            lambda root: edit(root / "nyu_test.txt", lambda text: text.replace("bath_test", "../x", 1)),
            DataError,
            "line 1 is '../x/rgb_00000.jpg",
        ),
        (
            lambda root: (root / "bath_test" / "sync_depth_00001.png").unlink(),
            MissingDataError,
            r"sync_depth_00001.png: no such file, and nyu_test.txt names it \(1 of 4 files",
        ),
        (
            lambda root: edit(root / "nyu_test.txt", lambda text: text + text),
            DataError,
            "lists bath_test/rgb_00000.jpg twice",
        ),
    ],
)
def test_a_list_with_one_thing_wrong_is_one_error(
    nyu: Path, change: Callable[[Path], None], error: type[DataError], message: str
) -> None:
    change(nyu)
    with pytest.raises(error, match=message):
        list_nyu(nyu, "test")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((480, 640), np.uint8), "a PNG of mode L; wanted 16 bits of grey, the depth in millimetres"),
        (np.zeros((480, 640, 3), np.uint8), "a PNG of mode RGB; wanted 16 bits of grey"),
        (np.zeros((48, 64), np.uint16), r"48 x 64 \(height x width\); NYU's depth maps are 480 x 640"),
    ],
)
def test_a_wrong_depth_map_is_one_error(tmp_path: Path, nyu: Path, pixels: np.ndarray, message: str) -> None:
    Image.fromarray(pixels).save(nyu / "bath_test" / "sync_depth_00000.png")
    split = nyu_split(nyu, "test", limit=None, memo=tmp_path / "memo")
    with pytest.raises(DataError, match=f"sync_depth_00000.png: {message}"):
        split.read_depth(0)


def test_a_file_that_is_no_image_of_nyus_size_is_one_error(tmp_path: Path, nyu: Path) -> None:
    split = nyu_split(nyu, "test", limit=None, memo=tmp_path / "memo")
    (nyu / "bath_test" / "sync_depth_00000.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"sync_depth_00000\.png: "):
        split.read_depth(0)
    Image.new("RGB", (64, 48)).save(nyu / "bath_test" / "rgb_00000.jpg")
    with pytest.raises(DataError, match=r"rgb_00000\.jpg: 48 x 64 .*; NYU's images are 480 x 640"):
        NyuImages(nyu_split(nyu, "test", limit=None, memo=tmp_path / "memo"), (480, 640))[0]
    shutil.copy(nyu / "nyu_test.txt", nyu / "bath_test" / "rgb_00000.jpg")
    with pytest.raises(DataError, match=r"nyu/test: bath_test/rgb_00000\.jpg: "):
        NyuImages(nyu_split(nyu, "test", limit=None, memo=tmp_path / "memo"), (480, 640))[0]


def test_only_the_eigen_crop_of_a_test_image_is_scored(tmp_path: Path, nyu: Path) -> None:
    split = nyu_split(nyu, "test", limit=None, memo=tmp_path / "memo")
    image, scored = NyuImages(split, (240, 320))[1]
    whole = split.read_depth(1)
    assert image.shape == (3, 240, 320)
    assert torch.equal(scored[EIGEN_CROP], whole[EIGEN_CROP])
    assert scored[EIGEN_CROP].count_nonzero() == scored.count_nonzero()
    assert scored[EIGEN_CROP].shape == (426, 560)


def test_image_and_depth_of_a_crop_move_together() -> None:
    rows, columns = torch.meshgrid(torch.arange(480), torch.arange(640), indexing="ij")
    image = torch.stack([rows % 251, columns % 251, torch.zeros_like(rows)]).to(torch.uint8)
    depth = (1 + rows + 480 * columns).float()
    starts, mirrored = set(), 0
    for seed in range(40):
        pixels, cut = augment(image, depth, np.random.default_rng(seed))
        assert pixels.shape == (3, *TRAIN_CROP) and cut.shape == TRAIN_CROP
        turns, mirrors, recolours = np.random.default_rng(seed).random(3) < 0.5
        if turns or recolours:
            continue
        row, column = (cut.long() - 1) % 480, (cut.long() - 1) // 480
        assert torch.equal((255 * pixels[0]).round().long(), row % 251)
        assert torch.equal((255 * pixels[1]).round().long(), column % 251)
        assert row.min() >= 45 and row.max() < 472 and column.min() >= 43 and column.max() < 608
        starts.add((int(row.min()), int(column.min())))
        mirrored += bool(mirrors)
        assert (column[0, 0] > column[0, -1]) == mirrors
    assert len(starts) > 4 and mirrored > 0


def test_rotation_and_colours_stay_in_their_ranges() -> None:
    image, depth = torch.full((3, 480, 640), 128, dtype=torch.uint8), torch.full((480, 640), 2.0)
    seen = {"hidden": 0, "recoloured": 0}
    for seed in range(40):
        pixels, cut = augment(image, depth, np.random.default_rng(seed))
        turns, _, recolours = np.random.default_rng(seed).random(3) < 0.5
        hidden = cut == 0
        seen["hidden"] += bool(hidden.any())
        assert turns or not hidden.any()
        assert hidden.float().mean() < 0.06 and set(cut.unique().tolist()) <= {0.0, 2.0}
        colour = pixels[:, 200, 270]
        seen["recoloured"] += bool(recolours)
        low, high = ((128 / 255) ** 1.1 * 0.75 * 0.9, (128 / 255) ** 0.9 * 1.25 * 1.1)
        assert (low - 1e-4 <= colour).all() and (colour <= high + 1e-4).all()
        assert recolours or torch.allclose(colour, torch.tensor(128 / 255), atol=1e-6)
    assert min(seen.values()) > 3


def test_a_crop_is_a_function_of_seed_and_position(tmp_path: Path, nyu: Path) -> None:
    split = nyu_split(nyu, "train", limit=None, memo=tmp_path / "memo")
    crops, again, other = (NyuCrops(split, seed, (208, 272)) for seed in (1, 1, 2))
    image, truth = crops[7]
    assert image.shape == (3, 208, 272) and truth.shape == TRAIN_CROP
    _ = again[3]
    assert torch.equal(image, again[7][0]) and torch.equal(truth, again[7][1])
    assert not torch.equal(image, other[7][0])


def test_every_round_holds_each_image_once() -> None:
    rounds = [[index_at(5 * epoch + i, 5, 3) for i in range(5)] for epoch in range(20)]
    assert all(sorted(each) == list(range(5)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 10


def test_the_generated_split_is_the_world() -> None:
    split = scene_split("val", 3, 5)
    assert torch.equal(split.read_depth(2), torch.from_numpy(depth(2, split="val", seed=5)))
    assert np.array_equal(split.images.read(2).numpy(), render(2, split="val", seed=5).image)
    assert len({scene_split("val", 3, 5).fingerprint, scene_split("val", 3, 6).fingerprint}) == 2

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.seg_probe.areas import MapWriter, legend, palette, side_by_side
from evals.seg_probe.data import read_labels
from evals.seg_probe.layouts import open_dataset


def test_a_written_map_is_an_annotation_again(tmp_path: Path, make_ade: Callable) -> None:
    data = open_dataset(make_ade(tmp_path / "mine"), voc_split=None, known={"ADE20K": [], "VOC2012": []})
    writer = MapWriter(tmp_path / "maps", data.val, data.labelling, (1, 2))
    said = np.random.default_rng(0).integers(0, 3, (56, 42)).astype(np.uint8)
    for place in range(4):
        writer(place, said if place != 2 else np.zeros((40, 56), np.uint8))
    assert [path.name for path in sorted((tmp_path / "maps").iterdir())] == [
        "0009-overlay.png", "0009.png", "0010-overlay.png", "0010.png",
    ]  # fmt: skip
    assert writer.files() == (
        "maps/0009.png", "maps/0009-overlay.png", "maps/0010.png", "maps/0010-overlay.png",
    )  # fmt: skip
    assert np.array_equal(read_labels(tmp_path / "maps/0009.png", data.labelling), said)
    with Image.open(tmp_path / "maps/0009-overlay.png") as overlay:
        assert overlay.width == 3 * 42 + 8 and overlay.height > 56


def test_names_that_leave_no_room_are_shortened(tmp_path: Path, make_ade: Callable) -> None:
    root, long = make_ade(tmp_path / "mine"), "x" * 250
    for number, last in (("0008", "a"), ("0009", "b")):
        for kind in ("images", "annotations"):
            folder = root / kind / "validation"
            (folder / f"{number}.png").rename(folder / f"{long}{last}.png")
    data = open_dataset(root, voc_split=None, known={"ADE20K": [], "VOC2012": []})
    writer = MapWriter(tmp_path / "maps", data.val, data.labelling, (2, 3))
    writer(2, np.zeros((40, 56), np.uint8))
    assert len(set(writer.files())) == 4
    assert all((tmp_path / name).is_file() for name in writer.files()[:2])


@pytest.mark.parametrize("count", [2, 11, 21, 150])
def test_colours_differ(count: int) -> None:
    colours = palette(count).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 999 * np.eye(count, dtype=int)
    assert apart.min() >= (40 if count < 25 else 1)


def test_void_is_clear_in_the_truth_and_faint_in_the_prediction() -> None:
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    truth = np.array([[0, 1, 255], [0, 1, 255]], dtype=np.uint8)
    colours = np.array([[200, 0, 0], [0, 200, 0]], dtype=np.uint8)
    shown = side_by_side(image, truth, np.zeros((2, 3), np.uint8), colours)
    assert shown.shape == (2, 3 * 3 + 8, 3)
    assert shown[0, :3].tolist() == [[100] * 3] * 3
    assert shown[0, 7:10].tolist() == [[160, 40, 40], [40, 160, 40], [100, 100, 100]]
    assert shown[0, 14:].tolist() == [[160, 40, 40], [160, 40, 40], [120, 80, 80]]


def test_the_legend_shows_each_colour_and_wraps() -> None:
    entries = [("a red thing", np.array([200, 0, 0], np.uint8)), ("🦊 <b>", np.array([0, 0, 200], np.uint8))]
    one, two = legend(entries, 400), legend(entries, 120)
    assert one.shape[1:] == (400, 3) and two.shape[1:] == (120, 3)
    assert two.shape[0] > one.shape[0] == legend(entries[:1], 120).shape[0]
    for shown in (one, two):
        for _, colour in entries:
            assert (shown == colour).all(axis=2).sum() == 13 * 13  # a square with both its edges
    assert (one == 0).all(axis=2).any()  # letters

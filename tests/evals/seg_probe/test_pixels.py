from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.seg_probe.datasets import Dataset, Labelling, open_dataset
from evals.seg_probe.pixels import check_split, read_labels
from radio.errors import DataError

ADE = Labelling(classes=tuple(f"thing {n}" for n in range(150)), zero_is_void=True)
FEW = Labelling(classes=("a", "b", "c"), zero_is_void=True)


def opened(root: Path) -> Dataset:
    return open_dataset(root, voc_split="train", known={"ADE20K": [], "VOC2012": []})


def saved(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def test_grey_palette_and_sixteen_bit_files_hold_the_same_labels(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 255, 1]], dtype=np.uint8)
    wanted = [[255, 0, 1], [2, 255, 0]]
    grey = saved(tmp_path / "grey.png", values)
    image = Image.fromarray(values)
    image.putpalette([(n * 91) % 256 for n in range(768)])
    image.save(tmp_path / "palette.png")
    wide = saved(tmp_path / "wide.png", values.astype(np.uint16))
    with Image.open(tmp_path / "palette.png") as palette, Image.open(wide) as deep:
        assert (palette.mode, deep.mode) == ("P", "I;16")
    for path in (grey, tmp_path / "palette.png", wide):
        assert read_labels(path, FEW).tolist() == wanted


@pytest.mark.parametrize(
    ("values", "labelling", "said"),
    [
        (np.full((4, 4), 200, np.uint8), ADE, "holds the label 200; wanted 1 to 150 for the 150 classes"),
        (np.full((4, 4), 65535, np.uint16), ADE, "holds the label 65535; wanted 1 to 150"),
        (np.full((4, 4), 300, np.uint16), FEW, "holds the label 300"),
        (np.zeros((4, 4, 3), np.uint8), ADE, r"stores colours \(mode RGB\); wanted the number of a class"),
        (np.zeros((4, 4, 4), np.uint8), ADE, r"stores colours \(mode RGBA\)"),
    ],
)
def test_annotations_that_are_none(tmp_path: Path, values, labelling, said) -> None:
    with pytest.raises(DataError, match=f"bad.png: {said}"):
        read_labels(saved(tmp_path / "bad.png", values), labelling)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png: not a picture"):
        read_labels(tmp_path / "text.png", FEW)
    with pytest.raises(DataError, match=r"gone.png: cannot be read \(No such file"):
        read_labels(tmp_path / "gone.png", FEW)


def test_a_good_split_is_read_once(tmp_path: Path, make_ade: Callable, monkeypatch) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    first = check_split(data.train, data.labelling, memo=tmp_path / "memo")
    assert first.sizes == ((40, 56), (56, 42))
    assert len(first.fingerprint) == 64
    monkeypatch.setattr("evals.seg_probe.pixels._inspect", lambda *_: pytest.fail("read again"))
    assert check_split(data.train, data.labelling, memo=tmp_path / "memo") == first


def test_the_fingerprint_covers_content_names_and_classes(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    twin = opened(make_ade(tmp_path / "twin"))
    prints = [check_split(data.train, data.labelling, memo=tmp_path / "a").fingerprint]
    assert check_split(twin.train, data.labelling, memo=tmp_path / "b").fingerprint == prints[0]
    named = Labelling(classes=("x", "y", "z"), zero_is_void=True)
    prints.append(check_split(data.train, named, memo=tmp_path / "c").fingerprint)
    path = data.train.pairs[0].labels
    saved(path, np.ones_like(np.asarray(Image.open(path))))
    prints.append(check_split(data.train, data.labelling, memo=tmp_path / "a").fingerprint)
    prints.append(check_split(data.val, data.labelling, memo=tmp_path / "d").fingerprint)
    assert len(set(prints)) == 4


def test_one_error_names_the_first_bad_file_and_counts_the_rest(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    for number in (2, 5):
        saved(data.train.pairs[number].labels, np.full((40, 56), 200 + number, np.uint8))
    with pytest.raises(DataError, match=r"0002.png: holds the label 202.*\(2 of 8 pairs are bad\)"):
        check_split(data.train, data.labelling, memo=tmp_path)
    assert not list(tmp_path.glob("seg-*"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda pair: pair.picture.write_bytes(pair.picture.read_bytes()[:300]), "0001.png: not a picture"),
        (lambda pair: saved(pair.labels, np.ones((4, 4), np.uint8)), "0001.png: 4x4 .* its picture is 56x42"),
        (
            lambda pair: [saved(path, np.ones((2, 600), np.uint8)) for path in (pair.picture, pair.labels)],
            "2x600 is over 256 times as long as wide",
        ),
    ],
)
def test_pairs_that_do_not_go(tmp_path: Path, make_ade: Callable, spoil: Callable, said: str) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    spoil(data.train.pairs[1])
    with pytest.raises(DataError, match=said):
        check_split(data.train, data.labelling, memo=tmp_path)


def test_nothing_but_void_is_an_error(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine", val=1))
    path = data.val.pairs[0].labels
    saved(path, np.zeros_like(np.asarray(Image.open(path))))
    with pytest.raises(DataError, match="validation: every pixel is void"):
        check_split(data.val, data.labelling, memo=tmp_path)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evals.seg_probe.data import Labelling, open_dataset
from radio.errors import DataError

KNOWN = {"ADE20K": [f"thing {n}" for n in range(150)], "VOC2012": [f"object {n}" for n in range(21)]}


def opened(root: Path, voc_split: str = "train", limit: int | None = None):
    return open_dataset(root, voc_split=voc_split, known=KNOWN, limit=limit)


def test_a_folder_in_ade20ks_layout_with_its_own_classes(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    assert data.labelling == Labelling(classes=("red", "green", "blue"), zero_is_void=True)
    assert [pair.key for pair in data.train.pairs] == [f"{n:04d}" for n in range(8)]
    assert [pair.labels.parent.name for pair in data.val.pairs] == ["validation"] * 4
    assert (data.train.name, data.notes) == ("mine/training", ())


@pytest.mark.parametrize("mark", ["objectInfo150.txt", "sceneCategories.txt", None])
def test_ade20k_itself(tmp_path: Path, make_ade: Callable, mark: str | None) -> None:
    root = make_ade(tmp_path / ("ADEChallengeData2016" if mark is None else "ade"))
    (root / "classes.txt").unlink()
    if mark:
        (root / mark).touch()
    data = opened(tmp_path if mark is None else root)
    assert data.labelling.classes == tuple(KNOWN["ADE20K"])
    assert data.labelling.zero_is_void
    assert data.notes[0].endswith("training has 8 images; ADE20K has 20,210")
    assert data.notes[1].endswith("validation has 4 images; ADE20K has 2,000")


def test_voc_and_its_augmented_split(tmp_path: Path, make_voc: Callable) -> None:
    lists = {"train": ["a", "b"], "val": ["c"], "trainaug": ["a", "b", "d"]}
    make_voc(tmp_path / "VOCdevkit" / "VOC2012", lists, augmented=["d"])
    data = opened(tmp_path)
    assert data.labelling == Labelling(classes=tuple(KNOWN["VOC2012"]), zero_is_void=False)
    assert [pair.key for pair in data.train.pairs] == ["a", "b"]
    assert data.train.name == "VOC2012/train"
    assert data.notes[0] == "VOC2012/train has 2 images; VOC2012 has 1,464"
    more = opened(tmp_path / "VOCdevkit", voc_split="trainaug")
    assert [pair.key for pair in more.train.pairs] == ["a", "b", "d"]
    assert [pair.labels.parent.name for pair in more.train.pairs] == [
        *["SegmentationClass"] * 2,
        "SegmentationClassAug",
    ]
    assert more.notes[0].endswith("VOC2012 has 10,582")


def test_vocs_augmented_split_as_mmsegmentations_converter_leaves_it(
    tmp_path: Path, make_voc: Callable
) -> None:
    lists = {"train": ["a"], "val": ["c"], "aug": ["d", "a"]}
    make_voc(tmp_path, lists, augmented=["d"])
    assert [pair.key for pair in opened(tmp_path, "trainaug").train.pairs] == ["a", "d"]
    (tmp_path / "ImageSets/Segmentation/aug.txt").unlink()
    with pytest.raises(DataError, match=r"nor aug.txt; --voc-split trainaug needs SBD's annotations"):
        opened(tmp_path, "trainaug")


def test_a_limit_of_none_is_an_error(tmp_path: Path, make_ade: Callable) -> None:
    with pytest.raises(DataError, match="a limit of 0 leaves no images; give 1 or more, or leave it out"):
        opened(make_ade(tmp_path), limit=0)


def test_a_limit_is_spread_over_both_splits(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path, train=9, val=4), limit=3)
    assert [pair.key for pair in data.train.pairs] == ["0000", "0003", "0006"]
    assert [pair.key for pair in data.val.pairs] == ["0009", "0010", "0011"]
    assert len(opened(tmp_path, limit=100).train.pairs) == 9


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda root: (root / "annotations/training/0003.png").unlink(),
            r"0003.png: has no annotation .*1 of 8",
        ),
        (
            lambda root: (root / "images/validation/0009.png").unlink(),
            r"0009.png: has no image of its name",
        ),
        (lambda root: (root / "classes.txt").unlink(), "has no classes.txt, and none of objectInfo150.txt"),
        (lambda root: (root / "classes.txt").write_text("one\n"), "lists 1 classes; wanted 2 to 254"),
        (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), "lists 'a' twice"),
        (lambda root: (root / "images/validation").rename(root / "images/val"), "images/validation: no such"),
        (lambda root: (root / "images").rename(root / "photos"), "neither ADE20K .* nor VOC2012"),
    ],
)
def test_layouts_that_are_not_whole(tmp_path: Path, make_ade: Callable, spoil: Callable, said: str) -> None:
    root = make_ade(tmp_path / "mine")
    spoil(root)
    with pytest.raises(DataError, match=said):
        opened(root)


def test_more_layouts_that_are_not_whole(tmp_path: Path, make_ade: Callable, make_voc: Callable) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        opened(tmp_path / "nowhere")
    root = make_ade(tmp_path / "mine")
    for path in (root / "images/training").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="images/training: holds no images"):
        opened(root)
    voc = make_voc(tmp_path / "voc", {"train": ["a"], "val": ["b"]})
    (voc / "SegmentationClass/b.png").unlink()
    with pytest.raises(DataError, match=r"b.jpg: has no annotation, neither"):
        opened(voc)
    (voc / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DataError, match=r"b.jpg: no such image"):
        opened(voc)
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val.txt: lists no images"):
        opened(voc)
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DataError, match=r"val.txt: no such list"):
        opened(voc)


def test_two_files_of_one_key_are_refused(tmp_path: Path, make_ade: Callable, make_voc: Callable) -> None:
    root = make_ade(tmp_path / "mine")
    twin = root / "images/training/0000.jpg"
    twin.touch()
    with pytest.raises(DataError, match=r"0000.jpg and 0000.png would share the mask 0000.png; give each"):
        opened(root)
    twin.unlink()
    (root / "annotations/training/0000.PNG").touch()
    with pytest.raises(DataError, match=r"0000.PNG and 0000.png would both be the mask of 0000;"):
        opened(root)
    voc = make_voc(tmp_path / "voc", {"train": ["a", "b"], "val": ["c"]})
    for lines in ("a\nb\na\n", "a.jpg\nb\na.png\n"):
        (voc / "ImageSets/Segmentation/train.txt").write_text(lines)
        with pytest.raises(DataError, match=r"train.txt: lists 'a' more than once \(1 of 2 names"):
            opened(voc)


def test_texts_may_have_a_byte_order_mark(tmp_path: Path, make_ade: Callable, make_voc: Callable) -> None:
    root = make_ade(tmp_path / "mine")
    (root / "classes.txt").write_bytes("\ufeffred\r\ngreen\u2028ish\r\nblue".encode())
    assert opened(root).labelling.classes == ("red", "green\u2028ish", "blue")
    (root / "classes.txt").write_bytes(b"red\xff\nblue")
    with pytest.raises(DataError, match=r"classes.txt: is not UTF-8 text \(byte 3: 0xff\)"):
        opened(root)
    voc = make_voc(tmp_path / "voc", {"train": ["a"], "val": ["b"]})
    (voc / "ImageSets/Segmentation/train.txt").write_text("\ufeffJPEGImages/a.jpg SegmentationClass/a.png\n")
    assert [pair.key for pair in opened(voc).train.pairs] == ["a"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(alphabet="ab\n\r \u2028\ufeff/.\0jpg", max_size=40).map(str.encode),
        st.sampled_from([b"a\n" * 300, b"\xff\xfea\0\n\0b\0", bytes(9), b"../../a.jpg\nb\n", b"a" * 5000]),
    )
)
def test_whatever_lists_hold_they_are_read_or_refused(tmp_path, make_ade, make_voc, content):
    root, voc = tmp_path / "ade", tmp_path / "voc"
    if not root.exists():
        make_ade(root, train=1, val=1)
        make_voc(voc, {"train": ["a", "b"], "val": ["c"]})
    for path in (root / "classes.txt", voc / "ImageSets/Segmentation/train.txt"):
        path.write_bytes(content)
    for folder in (root, voc):
        try:
            data = opened(folder)
        except DataError as error:
            said = str(error)
        else:
            said = str(folder)
            assert 2 <= len(data.labelling.classes) <= 254
            assert {pair.image.parent.parent for pair in data.train.pairs} <= {voc, root / "images"}
        assert said.startswith(str(folder))


def test_dots_in_names_stay(tmp_path: Path, make_voc: Callable) -> None:
    voc = make_voc(tmp_path / "voc", {"train": ["img.v1.1", "img.v1.2"], "val": ["img.v2.1"]})
    assert [pair.key for pair in opened(voc).train.pairs] == ["img.v1.1", "img.v1.2"]


def test_accents_may_be_written_in_either_form(
    tmp_path: Path, make_ade: Callable, make_voc: Callable
) -> None:
    root = make_ade(tmp_path / "mine")
    (root / "images/training/0000.png").rename(root / "images/training/\u00e9.png")
    (root / "annotations/training/0000.png").rename(root / "annotations/training/e\u0301.png")
    assert opened(root).train.pairs[-1].labels.name == "e\u0301.png"
    voc = make_voc(tmp_path / "voc", {"train": ["\u00e9"], "val": ["b"]})
    (voc / "ImageSets/Segmentation/train.txt").write_text("e\u0301\n")
    assert opened(voc).train.pairs[0].labels.name == "\u00e9.png"


def test_label_tables() -> None:
    ade = Labelling(classes=("a", "b"), zero_is_void=True)
    assert ade.table()[:4].tolist() == [255, 0, 1, 255]
    voc = Labelling(classes=("a", "b"), zero_is_void=False)
    assert voc.table()[:3].tolist() == [0, 1, 255]
    assert (ade.highest, voc.highest) == (2, 1)
    assert np.all(ade.table()[3:] == 255)
    assert ade.describe() == "1 to 2 for the 2 classes, 0 and 255 for void"
    assert voc.describe() == "0 to 1 for the 2 classes, 255 for void"


def test_numbered_classes_are_those_of_the_labels(tmp_path: Path, make_ade: Callable) -> None:
    root = make_ade(tmp_path / "mine")
    (root / "classes.txt").write_text("1 red\n2 green\n3 blue\n")
    assert opened(root).labelling.classes == ("red", "green", "blue")
    (root / "classes.txt").write_text("0: void\n1: red\n2: green\n3: blue\n")
    with pytest.raises(DataError, match="numbers its classes from 0, and label 1 is the first line"):
        opened(root)


def test_images_that_are_learned_and_scored_are_said(tmp_path: Path, make_voc: Callable) -> None:
    make_voc(tmp_path, {"train": ["a", "b"], "val": ["b", "c"]})
    assert opened(tmp_path).notes[-1] == "1 of the 2 images of val are also trained on"

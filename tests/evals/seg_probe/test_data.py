"""Layouts of data sets, and the validation of every file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from evals.seg_probe.data import (
    Dataset,
    Labelling,
    _map_labels,
    check_split,
    read_labels,
)
from evals.seg_probe.layouts import open_dataset
from radio.chunks import Damage
from radio.errors import DataError

KNOWN = {"ADE20K": [f"thing {n}" for n in range(150)], "VOC2012": [f"object {n}" for n in range(21)]}


def opened(root: Path, voc_split: str | None = None, limit: int | None = None) -> Dataset:
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


def test_a_split_of_vocs_opens_a_folder_with_contexts_annotations_as_voc(
    tmp_path: Path, make_voc: Callable
) -> None:
    make_voc(tmp_path, {"train": ["a"], "val": ["c"]})
    for folder in ("ImageSets/SegmentationContext", "SegmentationClassContext"):
        (tmp_path / folder).mkdir()
    assert opened(tmp_path, "train").val.name == "VOC2012/val"
    with pytest.raises(DataError, match=r"SegmentationContext/train.txt: no such list"):
        open_dataset(tmp_path, voc_split=None, known={**KNOWN, "Pascal Context": ["background", "a"]})


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


ADE = Labelling(classes=tuple(f"thing {n}" for n in range(150)), zero_is_void=True)
FEW = Labelling(classes=("a", "b", "c"), zero_is_void=True)


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
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text.png: not an image"):
        read_labels(tmp_path / "text.png", FEW)
    with pytest.raises(DataError, match=r"gone.png: no such file"):
        read_labels(tmp_path / "gone.png", FEW)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png: is no regular file"):
        read_labels(tmp_path / "pipe.png", FEW)
    for kind in ("JPEG", "BMP", "EPS"):
        Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / "other.png", format=kind)
        with pytest.raises(DataError, match=r"other.png: .*opens as none of PNG"):
            read_labels(tmp_path / "other.png", FEW)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2, 4, 8 or 16 bits a pixel, written by hand."""
    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0),
        b"IDAT" + zlib.compress(rows),
        b"IEND",
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_labels_are_the_numbers_stored_however_many_bits_they_have(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, min(2**bits, 16), (7, 13))
    (tmp_path / "m.png").write_bytes(grey_png(values, bits))
    many = Labelling(classes=tuple(f"c{n}" for n in range(40)), zero_is_void=False)
    assert read_labels(tmp_path / "m.png", many).tolist() == values.tolist()


def test_a_huge_mask_is_refused_by_its_header(tmp_path: Path) -> None:
    data = bytearray(grey_png(np.ones((4, 4), int), 8))
    data[16:24] = struct.pack(">II", 14_000, 14_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "m.png").write_bytes(data)
    with pytest.raises(DataError, match=r"m.png: 196 million pixels, the limit is 179 million"):
        read_labels(tmp_path / "m.png", FEW)


def test_a_mask_with_a_long_text_is_whole(tmp_path: Path) -> None:
    data = grey_png(np.ones((4, 4), int), 8)
    text = b"zTXtComment\0\0" + zlib.compress(bytes(2 << 20))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "m.png").write_bytes(data[:33] + chunk + data[33:])
    assert read_labels(tmp_path / "m.png", FEW).tolist() == [[0] * 4] * 4


MASKS = [grey_png(np.arange(16).reshape(4, 4) % 4, bits) for bits in (2, 4, 8, 16)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_masks_give_labels_or_one_error(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(MASKS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    if data.draw(st.booleans()):  # a header that is believed
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    try:
        labels = _map_labels(Path("m.png"), bytes(content), FEW)
    except DataError as error:
        said = str(error)
    else:
        said = "m.png: "
        assert set(np.unique(labels).tolist()) <= {0, 1, 2, 255}
    assert said.startswith("m.png: ")


def test_a_good_split_is_read_once(tmp_path: Path, make_ade: Callable, monkeypatch) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    first = check_split(data.train, data.labelling, memo=tmp_path / "memo")
    assert first.sizes == ((40, 56), (56, 42))
    assert len(first.fingerprint) == 64
    monkeypatch.setattr("evals.seg_probe.data._inspect", lambda *_: pytest.fail("read again"))
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
        (lambda pair: pair.image.write_bytes(pair.image.read_bytes()[:300]), "0001.png: not an image"),
        (lambda pair: saved(pair.labels, np.ones((4, 4), np.uint8)), "0001.png: 4x4 .* its image is 56x42"),
        (
            lambda pair: [saved(path, np.ones((2, 600), np.uint8)) for path in (pair.image, pair.labels)],
            "2x600 is over 256 times as long as wide",
        ),
    ],
)
def test_pairs_that_do_not_go(tmp_path: Path, make_ade: Callable, spoil: Callable, said: str) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    spoil(data.train.pairs[1])
    with pytest.raises(DataError, match=said):
        check_split(data.train, data.labelling, memo=tmp_path)


def test_a_damaged_memo_is_made_again_and_said(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    first = check_split(data.train, data.labelling, memo=tmp_path / "memo")
    (note,) = (tmp_path / "memo").iterdir()
    whole = note.read_bytes()
    altered = whole.replace(b"56", b"57")
    for damaged in (b"", b"[" * 100_000, whole[:-9], altered, b"\xff", b"{}\n"):
        note.write_bytes(damaged)
        damage = Damage()
        assert check_split(data.train, data.labelling, memo=tmp_path / "memo", damage=damage) == first
        assert note.read_bytes() == whole
        assert "1 damaged file of the cache was made again" in damage.notes()[0]


def test_an_orientation_that_is_not_applied_is_told(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine"))
    assert check_split(data.train, data.labelling, memo=tmp_path).rotated == 0
    exif = Image.Exif()
    exif[0x0112] = 6
    for pair in data.train.pairs[:2]:
        Image.open(io.BytesIO(pair.image.read_bytes())).save(pair.image, exif=exif)
    assert check_split(data.train, data.labelling, memo=tmp_path).rotated == 2
    pair = data.train.pairs[0]
    saved(pair.labels, np.ones((56, 40), np.uint8))
    with pytest.raises(DataError, match=r"56x40 .* is 40x56 \(its EXIF orientation, 6, is not applied\)"):
        check_split(data.train, data.labelling, memo=tmp_path)


def test_names_that_are_not_utf8_are_checked(tmp_path: Path, make_ade: Callable) -> None:
    root = make_ade(tmp_path / "mine")
    for kind in ("images", "annotations"):
        (root / kind / "training" / "0000.png").rename(root / kind / "training" / os.fsdecode(b"caf\xe9.png"))
    data = opened(root)
    assert r"caf\xe9" in [pair.key for pair in data.train.pairs]
    assert len(check_split(data.train, data.labelling, memo=tmp_path / "memo").fingerprint) == 64
    (root / "images/training/0001.png").unlink()
    (root / "images/training/0001.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"0001.png: cannot be read \(No such file"):
        check_split(opened(root).train, data.labelling, memo=tmp_path / "memo")


def test_nothing_but_void_is_an_error(tmp_path: Path, make_ade: Callable) -> None:
    data = opened(make_ade(tmp_path / "mine", val=1))
    path = data.val.pairs[0].labels
    saved(path, np.zeros_like(np.asarray(Image.open(path))))
    with pytest.raises(DataError, match="validation: every pixel is void"):
        check_split(data.val, data.labelling, memo=tmp_path)

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evals.seg_probe.data import Dataset, Labelling, _map_labels, check_split, open_dataset, read_labels
from radio.chunks import Damage
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

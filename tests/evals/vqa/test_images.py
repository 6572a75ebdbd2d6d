"""Images by name from folders and tar files, and padding to an aspect."""

from __future__ import annotations

import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.vqa.data import PADDING, NamedImages, PaddedImages, pad_image
from radio.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, png: Callable[[int, int], bytes]) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(png(0, 0))
    (tmp_path / "images" / "deep" / "b.png").write_bytes(png(2, 1))
    return tmp_path / "images"


def test_a_folder_and_a_tar_file_hold_the_same(
    folder: Path, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    members = [(f"./{n}", (folder / n).read_bytes()) for n in ("deep/b.png", "a.png")]
    shard = make_shard(tmp_path / "images.tar", members)
    loose, packed = NamedImages(folder), NamedImages(shard)
    for images in (loose, packed):
        assert "deep/b.png" in images and "c.png" not in images and 3 not in images
    names = ["deep/b.png", "a.png", "a.png"]
    ours, theirs = loose.source(names), packed.source(names)
    assert ours.keys == theirs.keys == ("a.png", "deep/b.png")
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.name, theirs.name) == ("images", "images.tar")
    assert torch.equal(ours.read(1), theirs.read(1))


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or tar file of images"):
        NamedImages(tmp_path / "absent")
    with pytest.raises(DataError, match=r"there is no image 'c.png'"):
        NamedImages(folder).source(["c.png"])
    assert "../images/a.png" not in NamedImages(folder)
    (tmp_path / "x.tar").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match="not a tar file without compression"):
        _ = "a" in NamedImages(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("image", "size", "padded"),
    [
        ((4, 10), (8, 8), (10, 10)),
        ((10, 4), (8, 8), (10, 10)),
        ((4, 4), (8, 16), (4, 8)),
        ((6, 6), (3, 3), (6, 6)),
    ],
)
def test_padding_to_the_aspect_of_the_size(
    image: tuple[int, int], size: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels = torch.randint(0, 256, (3, *image), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = pad_image(pixels, size)
    assert found.shape == (3, *padded)
    top, left = (padded[0] - image[0]) // 2, (padded[1] - image[1]) // 2
    assert torch.equal(found[:, top : top + image[0], left : left + image[1]], pixels)
    outside = torch.ones(padded, dtype=torch.bool)
    outside[top : top + image[0], left : left + image[1]] = False
    colour = torch.tensor([int(255 * part) for part in PADDING], dtype=torch.uint8)
    assert (found[:, outside] == colour[:, None]).all()


def test_a_padded_source_is_another_source(folder: Path) -> None:
    source = NamedImages(folder).source(["deep/b.png"])
    padded = PaddedImages(source, (32, 32))
    assert source.read(0).shape == (3, 20, 22)
    assert padded.read(0).shape == (3, 22, 22)
    assert padded.keys == source.keys and padded.labels.tolist() == [0] and padded.classes == ("",)
    assert padded.fingerprint != source.fingerprint


def test_no_name_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    images = NamedImages(folder)
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "deep/../../secret.png",
        "a\0.png",
        "x" * 5000,
    ):
        assert name not in images
    assert "link.png" in images and "./a.png" in images and "deep" not in images


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_in_either_form(
    stored: Any, tmp_path: Path, png: Callable[[int, int], bytes], make_shard: Callable[..., Path]
) -> None:
    name = unicodedata.normalize(stored, "é.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(png(0, 0))
    shard = make_shard(tmp_path / "images.tar", [(name, png(0, 0))])
    for form in ("NFC", "NFD"):
        asked = unicodedata.normalize(form, "é.png")
        assert asked in NamedImages(tmp_path / "images") and asked in NamedImages(shard)
        assert NamedImages(tmp_path / "images").source([asked]).read(0).shape[0] == 3


def test_tar_files_that_are_damaged(tmp_path: Path, png: Callable[[int, int], bytes]) -> None:
    def headers(*sizes: int) -> Path:
        path = tmp_path / "images.tar"
        with path.open("wb") as file:
            for number, size in enumerate(sizes):
                member = tarfile.TarInfo(f"{number % 2}.png")
                member.size = size
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                file.write(bytes(512))
        return path

    for sizes, message in (
        ((10, -512), r"1\.png is said to have -512 bytes"),
        ((10, 10**15), r"1\.png is said to have 1000000000000000 bytes"),
        ((10, 10, 10), r"holds 0\.png twice"),
    ):
        with pytest.raises(DataError, match=message):
            _ = "0.png" in NamedImages(headers(*sizes))

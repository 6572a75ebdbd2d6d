"""What cannot be read is passed over, counted exactly by its cause, and does not disturb what can be."""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest

from radio.errors import ConfigError, DataError
from train.config import DataConfig
from train.data.errors import ErrorList, ReadError, ShardError
from train.data.shards import Shards
from train.data.streams import open_sources
from train.data.tar import TarStream

from ..conftest import fill_folder, image_bytes
from .conftest import follow, pack, pack_images, settings
from .test_tar import DAMAGED, END


def damaged(folder: Path) -> str:
    """Six shards: two whole, one cut in the middle, one with text named .jpg, one empty, one missing."""
    pack_images(folder / "0.tar", 0, 4)
    pack_images(folder / "1.tar", 10, 4)
    pack_images(folder / "2.tar", 20, 6)
    data = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(data[: data.index(b"00023.jpg") + 700])  # three whole ones before
    good = image_bytes(30, "JPEG")
    pack(folder / "3.tar", [("00030.jpg", good), ("00031.jpg", b"this is text"), ("00032.jpg", good)])
    (folder / "4.tar").touch()
    return f"{folder}/{{0..5}}.tar"


def named(faults: Iterable[ReadError]) -> list[tuple[str, str]]:
    return [(fault.cause, fault.where) for fault in faults]


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_counted_exactly(tmp_path: Path, lanes: int, workers: int) -> None:
    pattern = damaged(tmp_path)
    config = settings(DataConfig(shards=(pattern,), num_streams=lanes))
    faults: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    begun = 0
    for step in follow(config, range(13), workers=workers):  # 104 images: 8 epochs of 13
        faults.update(named(step[0].stats.errors))
        seen.update(step[0].keys)
        begun += step[0].stats.shards
    assert set(faults) == {
        ("truncated", f"{tmp_path}/2.tar"),
        ("image", f"{tmp_path}/3.tar/00031.jpg"),
        ("empty", f"{tmp_path}/4.tar"),
        ("missing", f"{tmp_path}/5.tar"),
    }
    whole = {
        f"{index // 10}.tar/{index:05d}.jpg" for index in (*range(4), *range(10, 14), 20, 21, 22, 30, 32)
    }
    assert set(seen) == whole
    if lanes == 1:  # whole epochs, but for the faults after the last image
        assert set(seen.values()) == {8}
        assert all(count in (7, 8) for count in faults.values())
        assert begun in range(8 * 6 - 3, 8 * 6 + 1)


def test_counts_go_on_after_a_stop(tmp_path: Path) -> None:
    config = settings(DataConfig(shards=(damaged(tmp_path),), num_streams=4))
    whole = list(follow(config, range(12)))
    counted = [len(step[0].stats.errors) for step in whole]
    assert sum(counted) > 10
    for stop in range(1, 12):
        rest = list(follow(config, range(stop, 12), cursors=[whole[stop - 1][0].cursors]))
        assert [named(step[0].stats.errors) for step in rest] == [
            named(step[0].stats.errors) for step in whole[stop:]
        ]
        assert [step[0].stats.shards for step in rest] == [step[0].stats.shards for step in whole[stop:]]


def test_a_broken_image_is_followed_by_the_lanes_next(tmp_path: Path) -> None:
    files = [(f"{n}.jpg", image_bytes(n, "JPEG") if n != 2 else b"text") for n in range(6)]
    pack(tmp_path / "a.tar", files)
    config = settings(DataConfig(shards=(str(tmp_path / "a.tar"),), num_streams=1), batch_size=5)
    (rows,), *_ = follow(config, range(1))
    assert rows.keys == tuple(f"a.tar/{n}.jpg" for n in (0, 1, 3, 4, 5))


def test_broken_images_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 9, broken=3)
    config = settings(DataConfig(images=(folder,)), batch_size=3)
    rows = [step[0] for step in follow(config, range(12))]
    faults = Counter(chain.from_iterable(each.stats.errors for each in rows))
    assert {fault.where for fault in faults} == {f"{folder}/z{n:03d}.jpg" for n in range(3)}
    assert {fault.cause for fault in faults} == {"image"}
    assert Counter(chain.from_iterable(each.keys for each in rows)).keys() == set(map(str, range(9)))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_image_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    shards = settings(DataConfig(shards=(f"{tmp_path}/{{0..3}}.tar",)))
    with pytest.raises(DataError, match=r"^no image in \d+ shards in a row, the last .*; check the data$"):
        list(follow(shards, range(1), workers=workers))
    folder = settings(DataConfig(images=(fill_folder(tmp_path / "broken", 0, broken=3),)))
    with pytest.raises(DataError, match=r"^20 images in a row cannot be read, the last: .*check the data$"):
        list(follow(folder, range(1), workers=workers))


def dotted(folder: Path, dotted: int, plain: int) -> str:
    """A shard of images some of whose names have more dots than one."""
    names = [f"img.v1.{n:04d}.jpg" for n in range(dotted)] + [f"img_{n:04d}.jpg" for n in range(plain)]
    return str(pack(folder / "a.tar", [(name, image_bytes(n, "JPEG")) for n, name in enumerate(names)]))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("piped", [False, True])
def test_images_that_are_not_samples_are_told(tmp_path: Path, lanes: int, piped: bool) -> None:
    path = dotted(tmp_path, 4, 4)
    pattern = f"pipe:cat {path}" if piped else path
    config = settings(DataConfig(shards=(pattern,), num_streams=lanes), batch_size=4)
    rows = [step[0] for step in follow(config, range(6))]
    assert len(set(chain.from_iterable(each.keys for each in rows))) == 4
    assert {fault for each in rows for fault in each.stats.errors} == {
        ReadError(
            "left out",
            pattern,
            "4 members end in an image's ending and are not samples, the first is img.v1.0000.jpg (its "
            "ending begins at the first dot: .v1.0000.jpg); rename them, as in img_v1_0000.jpg",
        )
    }


def test_a_shard_of_no_samples_says_why(tmp_path: Path) -> None:
    config = settings(DataConfig(shards=(dotted(tmp_path, 8, 0),)))
    with pytest.raises(DataError, match=r"holds no images: 8 members end in .* img\.v1\.0000\.jpg"):
        list(follow(config, range(1)))


def test_a_image_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.shards.MAX_IMAGE_BYTES", 2000)
    good = image_bytes(0, "JPEG", (20, 24))
    assert len(good) < 2000
    path = pack(tmp_path / "a.tar", [("0.jpg", good), ("1.jpg", b"x" * 2001), ("2.jpg", good)])
    config = settings(DataConfig(shards=(str(path),), num_streams=1), batch_size=2)
    (rows,), *_ = follow(config, range(1))
    assert rows.keys == ("a.tar/0.jpg", "a.tar/2.jpg")
    assert rows.stats.errors == [
        ReadError("image", f"{path}/1.jpg", "has 2001 bytes, and the limit is 2000"),
    ]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case[0])
def test_a_damaged_header_ends_a_shard(tmp_path: Path, case: tuple[str, bytes, str], lanes: int) -> None:
    """Also where lanes jump from image to image."""
    images = [(f"{n}.jpg", image_bytes(n, "JPEG")) for n in range(3)]
    path = pack(tmp_path / "a.tar", images)
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    after = path.read_bytes()[:end]  # more of them, which must not be taken for their own
    path.write_bytes(after + case[1].replace(END, b"") + after + END)
    config = settings(DataConfig(shards=(str(path),), num_streams=lanes), batch_size=4)
    rows = [step[0] for step in follow(config, range(6))]
    assert set(chain.from_iterable(each.keys for each in rows)) == {f"a.tar/{n}.jpg" for n in range(3)}
    faults = {fault for each in rows for fault in each.stats.errors}
    assert {(fault.cause, fault.where) for fault in faults} == {("unreadable", str(path))}
    assert all(re.search(case[2], fault.why) for fault in faults)


def test_a_shard_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", 0, 3)
    config = settings(DataConfig(shards=(str(path),), num_streams=4), batch_size=4)
    steps = follow(config, range(20))
    next(steps)
    pack_images(path, 0, 9)
    faults = [fault for step in steps for fault in step[0].stats.errors]
    assert faults
    assert {fault.cause for fault in faults} == {"unreadable"}


def test_no_shard_is_asked_for_again_when_all_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    def refuse(name: str, position: int = 0) -> TarStream:
        asked[name] += 1
        raise ShardError("unreadable", "no network")

    monkeypatch.setattr("train.data.shards.open_shard", refuse)
    for count, most in ((1, 1), (4, 100)):
        asked.clear()
        names = tuple(f"https://host/{n}.tar" for n in range(count))
        config = settings(DataConfig(shards=names, num_streams=4))
        with pytest.raises(DataError, match=r"no image in \d+ shards in a row, the last .*\(no network\)"):
            list(follow(config, range(1)))
        assert len(asked) == count
        assert asked.total() <= most


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "damaged",
    [
        image_bytes(0, "AVIF")[:-40],
        b"DDS " + b"\x7c\0\0\0" + b"\xff" * 200,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 60,
        b"\xff\xd8\xff" + b"\xff" * 60,
        b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
        b"II*\0\xff\xff\xff\xff",
        b"",
    ],
    ids=["avif", "dds", "eps", "png", "jpeg", "webp", "tiff", "empty"],
)
def test_an_image_damaged_in_any_way_is_counted(tmp_path: Path, damaged: bytes) -> None:
    good = image_bytes(0, "JPEG", (20, 24))
    path = pack(tmp_path / "a.tar", [("0.jpg", good), ("1.png", damaged), ("2.jpg", good)])
    config = settings(DataConfig(shards=(str(path),), num_streams=1), batch_size=2)
    (rows,), *_ = follow(config, range(1))
    assert rows.keys == ("a.tar/0.jpg", "a.tar/2.jpg")
    assert [(fault.cause, fault.where) for fault in rows.stats.errors] == [("image", f"{path}/1.png")]


def test_shards_that_take_too_long_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.shards._LONG", -1.0)
    config = settings(DataConfig(shards=(f"{tmp_path}/{{0..9}}.tar",)))
    with pytest.raises(DataError, match=r"no image in 3 shards in a row, the last .* \(no such shard\)"):
        list(follow(config, range(1)))


def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    files = [(f"{name}{n}.jpg", image_bytes(n, "JPEG")) for n in range(3)] + [(f"{name}9.jpg", b"text")]
    path = pack(tmp_path / f"{name}.tar", files)
    config = settings(DataConfig(shards=(str(path),), num_streams=1), batch_size=3)
    for workers in (0, 1):
        (rows,), *_ = follow(config, range(1), workers=workers)
        assert rows.keys == tuple(f"{name}.tar/{name}{n}.jpg" for n in range(3))
    assert len(open_sources(config.data).fingerprint) == 64
    told: list[str] = []
    ErrorList(tmp_path / "broken.jsonl", told.append).add(
        fault for (rows,) in follow(config, range(2)) for fault in rows.stats.errors
    )
    assert json.loads((tmp_path / "broken.jsonl").read_text())["where"].endswith("/caf\\udce99.jpg")


@pytest.mark.parametrize("weights", [(1, math.nan), (math.inf, 1), (1e308, 1e308), (-1, 1), (1,)])
def test_weights_are_numbers_above_zero(shards: str, weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="wanted a number above zero for each of the 2 sources"):
        open_sources(DataConfig(shards=(shards,), scenes=3, weights=weights))


def test_the_fingerprint_is_of_names_not_of_places() -> None:
    here, there = (
        Shards("x", ["/a/0.tar", "/a/1.tar"]),
        Shards("y", ["http://b/c/0.tar", "pipe:cat /d/1.tar"]),
    )
    assert here.fingerprint == there.fingerprint
    assert here.fingerprint != Shards("x", ["/a/0.tar", "/a/2.tar"]).fingerprint


def test_the_card_names_every_part(shards: str, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "folder", 3)
    data = DataConfig(shards=(shards,), images=(folder,), scenes=2, weights=(1, 1, 1))
    sources = open_sources(data)
    assert sources.count is None
    assert open_sources(DataConfig(images=(folder,), scenes=2)).count == 5
    assert [part["path"] for part in sources.sources] == [shards, str(folder), "scenes:train?seed=2"]
    assert sources.sources[0]["shards"] == 7
    assert [part.get("count") for part in sources.sources] == [None, 3, 2]
    assert all(part["labels_used"] is False and len(part["fingerprint"]) == 64 for part in sources.sources)

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from radio.data import aligned_labels, imagenet_numbers, open_source
from radio.errors import DataError
from radio.image_files import count_images, list_folder, list_unlabelled
from radio.images import decode
from radio.scenes import CLASSES, render
from train.config import DataConfig
from train.data.streams import open_images

Folder = Callable[..., Path]
Shard = Callable[..., Path]
Png = Callable[[int, int], bytes]


def test_a_folder_gives_its_images_sorted_with_their_classes(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", classes=2, count=3)
    (root / "c0" / "notes.txt").write_text("not an image")
    (root / "c0" / ".hidden.png").write_bytes(b"")
    (root / "c1" / "deeper").mkdir()
    (root / "c1" / "000.png").rename(root / "c1" / "deeper" / "000.png")
    source = open_source(str(root))
    assert source.classes == ("c0", "c1")
    assert source.keys == (
        "c0/000.png", "c0/001.png", "c0/002.png", "c1/001.png", "c1/002.png", "c1/deeper/000.png",
    )  # fmt: skip
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(source.read(3), decode((root / "c1" / "001.png").read_bytes()))


def test_shards_give_what_a_folder_gives(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    for shard in range(2):
        members = []
        for number in range(3):
            members.append((f"{number:03d}.cls", str(10 - shard).encode()))
            members.append((f"{number:03d}.png", png(shard, number)))
            members.append((f"{number:03d}.json", b"{}"))
        make_shard(tmp_path / f"p-{shard:06d}.tar", members)
    source = open_source(str(tmp_path / "p-{000000..000001}.tar"))
    assert source.classes == ("9", "10")  # numbers by value
    assert source.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert source.keys[3] == "p-000001/000"
    assert torch.equal(source.read(4), decode(png(1, 1)))
    again = open_source(str(tmp_path))
    assert again.fingerprint == source.fingerprint


def test_scenes_are_the_generated_world() -> None:
    source = open_source("scenes:val", scenes=7, seed=3)
    scene = render(5, split="val", seed=3, size=96)
    assert source.classes == CLASSES
    assert int(source.labels[5]) == scene.label
    assert torch.equal(source.read(5), torch.from_numpy(scene.image))
    assert len(source.keys) == 7
    assert source.fingerprint != open_source("scenes:val", scenes=7, seed=4).fingerprint
    assert source.fingerprint != open_source("scenes:val", scenes=8, seed=3).fingerprint


def test_a_limit_is_spread_over_the_classes(tmp_path: Path, make_folder: Folder) -> None:
    source = open_source(str(make_folder(tmp_path / "d", classes=3, count=10)), limit=6)
    assert np.bincount(source.labels).tolist() == [2, 2, 2]
    assert len(open_source(str(tmp_path / "d"), limit=1000).keys) == 30


def test_the_fingerprint_follows_content_not_place_or_time(tmp_path: Path, make_folder: Folder) -> None:
    one, two = make_folder(tmp_path / "one"), make_folder(tmp_path / "two")
    os.utime(two / "c0" / "000.png", (1, 1))
    fingerprint = open_source(str(one)).fingerprint
    assert open_source(str(two)).fingerprint == fingerprint
    data = bytearray((two / "c0" / "000.png").read_bytes())
    data[-20] ^= 1
    (two / "c0" / "000.png").write_bytes(data)
    assert open_source(str(two)).fingerprint != fingerprint
    (one / "c0" / "000.png").rename(one / "c0" / "000b.png")
    assert open_source(str(one)).fingerprint != fingerprint


def test_the_memo_saves_reading_and_notices_a_change(
    tmp_path: Path, make_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, memo = make_folder(tmp_path / "d"), tmp_path / "memo"
    fingerprint = open_source(str(root), memo=memo).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr("radio.image_files._bytes", lambda entry: pytest.fail("read again"))
        assert open_source(str(root), memo=memo).fingerprint == fingerprint
    (root / "c0" / "000.png").write_bytes((root / "c1" / "000.png").read_bytes())
    assert open_source(str(root), memo=memo).fingerprint != fingerprint


def test_a_large_set_is_known_by_the_names_sizes_and_times_of_its_files(
    tmp_path: Path, make_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, memo = make_folder(tmp_path / "d", classes=2, count=3), tmp_path / "memo"
    size = sum(path.stat().st_size for path in root.glob("*/*.png"))
    monkeypatch.setattr("radio.image_files.MAX_HASHED_BYTES", size)
    small = open_source(str(root), memo=memo)
    assert len(small.fingerprint) == 64 and small.notes == ()
    monkeypatch.setattr("radio.image_files.MAX_HASHED_BYTES", size - 1)
    labels: list[tuple[str, int]] = []

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Callable[[int], None]]:
        labels.append((label, total))
        yield lambda steps: None

    with monkeypatch.context() as patch:
        patch.setattr("radio.image_files._bytes", lambda entry: pytest.fail("an image was read"))
        large = open_source(str(root), memo=memo, watch=watch)
        fingerprint = large.fingerprint
    assert fingerprint.startswith("files-") and len(fingerprint) == 70
    assert labels == [("listing d", 6)]
    (note,) = large.notes
    assert note == (
        "d has 0 GB, so its fingerprint is of names, sizes and times of files instead of their contents; "
        "a copy with other times has another"
    )
    assert (
        open_source(str(root), limit=5).fingerprint == open_source(str(root), limit=5, memo=memo).fingerprint
    )
    assert len(open_source(str(root), limit=5).fingerprint) == 64  # five of the six images are not large
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)  # keeps the times
    assert open_source(str(copy)).fingerprint == fingerprint
    path = copy / "c0" / "000.png"
    stat = path.stat()
    os.utime(path, (stat.st_atime, stat.st_mtime + 1))
    assert open_source(str(copy)).fingerprint != fingerprint
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_source(str(copy)).fingerprint == fingerprint
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_source(str(copy)).fingerprint != fingerprint
    (root / "c1" / "000.png").rename(root / "c1" / "0.png")
    assert open_source(str(root)).fingerprint != fingerprint


def test_a_large_set_of_shards_is_known_by_its_members(
    tmp_path: Path, make_shard: Shard, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shard(label: bytes) -> str:
        path = make_shard(tmp_path / "s.tar", [("0.png", png(4, 4)), ("0.cls", label)])
        os.utime(path, (1000, 1000))
        return open_source(str(path)).fingerprint

    monkeypatch.setattr("radio.image_files.MAX_HASHED_BYTES", 1)
    first = shard(b"1")
    assert first.startswith("files-")
    assert shard(b"2") != first
    assert shard(b"1") == first


def test_hashing_shows_how_far_it_is(tmp_path: Path, make_folder: Folder) -> None:
    shown: list[tuple[str, int]] = []
    done: list[int] = []

    @contextmanager
    def watch(label: str, total: int) -> Iterator[Callable[[int], None]]:
        shown.append((label, total))
        yield done.append

    root = str(make_folder(tmp_path / "d"))
    for _ in range(2):
        _ = open_source(root, memo=tmp_path / "memo", watch=watch).fingerprint
    assert shown == [("hashing d", 18)]  # once: then the memo has it
    assert sum(done) == 18


def test_a_damaged_memo_is_made_again_and_said(
    tmp_path: Path, make_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    root, memo = make_folder(tmp_path / "d"), tmp_path / "memo"
    fingerprint = open_source(str(root), memo=memo).fingerprint
    (note,) = memo.iterdir()
    whole = note.read_bytes()
    for damaged in (
        b"",
        b"[" * 100_000,
        whole[:-9],
        whole.replace(fingerprint[:4].encode(), b"0000"),
        b"\xff",
    ):
        note.write_bytes(damaged)
        assert open_source(str(root), memo=memo).fingerprint == fingerprint
        assert note.read_bytes() == whole
    assert sum("damaged, made again" in message for message in caplog.messages) == 5


def test_links_in_a_circle_give_each_image_once(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", classes=2, count=3)
    keys = open_source(str(root)).keys
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "x.png").write_bytes((root / "c0" / "000.png").read_bytes())
    (tmp_path / "more" / "deep" / "up").symlink_to(tmp_path / "more")
    for name, target in (("again", "."), ("all", ".."), ("other", "../c1"), ("more", "../../more")):
        (root / "c0" / name).symlink_to(target)
    assert open_source(str(root)).keys == (*keys[:3], "c0/more/x.png", *keys[3:])
    (root / "alias").symlink_to("c0")
    with pytest.raises(DataError, match=r"alias: is a link to .*c0, whose images are there already"):
        open_source(str(root))


def test_images_are_counted_as_they_are_listed(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", classes=3, count=2)
    (root / "c0" / "notes.txt").write_text("not an image")
    (root / "c0" / ".hidden.png").write_bytes(b"")
    (root / ".hidden").mkdir()
    (root / "c1" / "deeper").mkdir()
    (root / "c1" / "deeper" / "a.JPEG").write_bytes(b"")
    (root / "c1" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "c2" / "back").symlink_to(root / "c1")
    counts = count_images(root)
    listing = list_folder(root)
    assert counts == {name: sum(e.label == name for e in listing.entries) for name in listing.classes}
    assert counts == {"c0": 2, "c1": 4, "c2": 2}


def test_a_linked_folder_is_listed_whole(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", classes=2)
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "e").mkdir()
    for name in ("c0", "c1"):
        (tmp_path / "e" / name).symlink_to(root / name)
    wanted = open_source(str(root))
    for path in ("link", "e"):
        assert open_source(str(tmp_path / path)).fingerprint == wanted.fingerprint
    assert len(list_unlabelled(str(tmp_path / "link")).entries) == len(wanted.keys)


def test_what_cannot_be_read_is_named_when_it_is_its_turn(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", classes=1, count=1)
    (root / "c0" / "dead.png").symlink_to("nowhere.png")
    (root / "c0" / "self.png").symlink_to("self.png")
    os.mkfifo(root / "c0" / "pipe.png")
    with (root / "c0" / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    source = open_source(str(root), memo=tmp_path / "memo")
    assert len(source.fingerprint) == 64
    assert source.keys == ("c0/000.png", "c0/dead.png", "c0/huge.png", "c0/pipe.png", "c0/self.png")
    for place in (1, 3, 4):
        with pytest.raises(DataError, match="is a link that leads nowhere, or no regular file"):
            source.read(place)
    with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes, the limit is 1,073,741,824"):
        source.read(2)
    (root / "c0" / "nowhere.png").write_bytes((root / "c0" / "000.png").read_bytes())
    assert open_source(str(root), memo=tmp_path / "memo").fingerprint != source.fingerprint


def test_names_that_are_not_utf8_are_scored(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    folder = tmp_path / "d" / os.fsdecode(b"th\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(png(0, 0))
    shard = make_shard(tmp_path / "s.tar", [("caf\udce9.png", png(0, 0)), ("caf\udce9.cls", b"1")])
    for source, key in ((str(tmp_path / "d"), r"th\xe9/caf\xe9.png"), (str(shard), r"s/caf\xe9")):
        found = open_source(source, memo=tmp_path / "memo")
        assert found.keys == (key,)
        assert len(found.fingerprint) == 64
        assert torch.equal(found.read(0), decode(png(0, 0)))


def test_accents_may_be_written_in_either_form(tmp_path: Path, png: Png) -> None:
    for root, names in (("bank", ["abc", "caf\u00e9"]), ("query", ["cafe\u0301"])):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "0.png").write_bytes(png(0, 0))
    bank, query = (open_source(str(tmp_path / root)) for root in ("bank", "query"))
    assert aligned_labels(query, bank).tolist() == [1]
    (tmp_path / "bank" / "cafe\u0301").mkdir()
    (tmp_path / "bank" / "cafe\u0301" / "0.png").write_bytes(png(0, 0))
    both = open_source(str(tmp_path / "bank"))
    assert aligned_labels(query, both).tolist() == [1]  # "cafe" and an accent comes before "café"
    (tmp_path / "other" / "cafe\u0301\u0323").mkdir(parents=True)
    (tmp_path / "other" / "cafe\u0301\u0323" / "0.png").write_bytes(png(0, 0))
    with pytest.raises(DataError, match="bank lacks"):
        aligned_labels(open_source(str(tmp_path / "other")), both)


def test_a_number_has_no_names_that_are_like_it(tmp_path: Path, png: Png) -> None:
    for root, names in (("bank", [str(n) for n in range(49)]), ("query", ["49"])):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "0.png").write_bytes(png(0, 0))
    bank, query = (open_source(str(tmp_path / root)) for root in ("bank", "query"))
    with pytest.raises(DataError, match=r"the first is '49'; it has 0, 1, 10, 11, 12…$"):
        aligned_labels(query, bank)


def labelled(path: Path, labels: list[str], make_shard: Shard, png: Png) -> str:
    members = [
        (f"{n}.{e}", c)
        for n, label in enumerate(labels)
        for e, c in (("png", png(0, n)), ("cls", label.encode()))
    ]
    return str(make_shard(path, members))


def test_a_number_is_one_class_however_it_is_written(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    numbers = open_source(labelled(tmp_path / "n.tar", ["07", "7", "10", "9", "00", "0"], make_shard, png))
    assert numbers.classes == ("0", "7", "9", "10")
    assert numbers.labels.tolist() == [1, 1, 3, 2, 0, 0]
    words = open_source(labelled(tmp_path / "w.tar", ["7a", "07a"], make_shard, png))
    assert words.classes == ("07a", "7a")
    with pytest.raises(DataError, match=r"classes are numbers \(7\) in some \.cls and words \(cat\) in"):
        open_source(labelled(tmp_path / "m.tar", ["7", "cat"], make_shard, png))
    for folder in ("00", "07", "09", "10"):
        (tmp_path / "folder" / folder).mkdir(parents=True)
        (tmp_path / "folder" / folder / "0.png").write_bytes(png(0, 0))
    assert aligned_labels(numbers, open_source(str(tmp_path / "folder"))).tolist() == [1, 1, 3, 2, 0, 0]


def test_what_is_no_sample_of_a_shard_is_told(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    dotted = [(f"img.v1.{n:04d}.{e}", c) for n in range(4) for e, c in (("png", png(0, n)), ("cls", b"1"))]
    plain = [("0.png", png(0, 0)), ("0.cls", b"1")]
    note = (
        "4 members end in an image's ending and are not samples, the first is img.v1.0000.png (its ending "
        "begins at the first dot: .v1.0000.png); rename them, as in img_v1_0000.png"
    )
    some = open_source(str(make_shard(tmp_path / "some.tar", dotted + plain)))
    assert (some.keys, some.notes) == (("some/0",), (f"some.tar: {note}",))
    with pytest.raises(DataError, match=re.escape(f"all.tar: no images; all.tar: {note}")):
        open_source(str(make_shard(tmp_path / "all.tar", dotted)))
    with pytest.raises(DataError, match=re.escape(f"all.tar: holds no images; all.tar: {note}")):
        list_unlabelled(str(tmp_path / "all.tar"))


def test_shards_of_one_name_are_refused(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    for folder in ("a", "b"):
        make_shard(tmp_path / folder / "0.tar", [("0.png", png(0, 0)), ("0.cls", b"1")])
    with pytest.raises(DataError, match=r"a/0.tar and .*b/0.tar: two shards of one name"):
        open_source(str(tmp_path / "{a,b}" / "0.tar"))
    with pytest.raises(DataError, match="stands for 1,000,000,000 names"):
        open_source(str(tmp_path / "{0..999999999}.tar"))


def test_labels_are_aligned_by_class_name(tmp_path: Path, make_folder: Folder) -> None:
    bank = open_source(str(make_folder(tmp_path / "bank", classes=3)))
    make_folder(tmp_path / "query", classes=3, count=1)
    (tmp_path / "query" / "c0").rename(tmp_path / "query" / "gone")
    (tmp_path / "query" / "gone" / "000.png").unlink()
    (tmp_path / "query" / "gone").rmdir()
    query = open_source(str(tmp_path / "query"))
    assert query.labels.tolist() == [0, 1]
    assert aligned_labels(query, bank).tolist() == [1, 2]
    with pytest.raises(DataError, match="bank has 1 classes that query lacks, the first is 'c0'"):
        aligned_labels(bank, query)


def test_imagenets_numbers_stand_for_its_ids_where_the_other_has_those(
    tmp_path: Path, make_shard: Shard, png: Png
) -> None:
    ids = list(imagenet_numbers())
    for root, names in (("ids", [ids[3], ids[998]]), ("part", ["3", "998"]), ("beyond", ["3", "1000"])):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            (tmp_path / root / name / "0.png").write_bytes(png(0, 0))
    folders = {root: open_source(str(tmp_path / root)) for root in ("ids", "part", "beyond")}
    assert aligned_labels(folders["part"], folders["ids"]).tolist() == [0, 1]
    with pytest.raises(DataError, match="beyond has 1 classes that ids lacks, the first is '1000'; it"):
        aligned_labels(folders["beyond"], folders["ids"])
    with pytest.raises(DataError, match="part lacks"):  # whose numbers may count from anywhere
        aligned_labels(folders["ids"], folders["part"])
    whole = open_source(labelled(tmp_path / "all.tar", [f"{n:03d}" for n in range(1000)], make_shard, png))
    assert aligned_labels(folders["ids"], whole).tolist() == [3, 998]


def test_no_such_folder_offers_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "cifar-train").mkdir()
    with pytest.raises(DataError, match="no such folder; did you mean cifar-train"):
        open_source(str(tmp_path / "cifar-trian"))
    with pytest.raises(DataError, match="nor"):
        open_source(str(tmp_path / "no" / "where"))


def test_folders_in_other_layouts_are_errors(tmp_path: Path, make_folder: Folder, png: Png) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither class folders nor tar shards"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(png(0, 0))
    with pytest.raises(DataError, match="images but no class folders"):
        open_source(str(tmp_path / "loose"))
    make_folder(tmp_path / "d", classes=2)
    (tmp_path / "d" / "c9").mkdir()
    with pytest.raises(DataError, match="c9: a class folder without images"):
        open_source(str(tmp_path / "d"))
    for split in ("train", "val"):
        make_folder(tmp_path / "root" / split, classes=2)
    with pytest.raises(DataError, match="holds the splits train, val; name one of them"):
        open_source(str(tmp_path / "root"))


def test_bad_shards_are_errors(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    with pytest.raises(DataError, match="no such shard"):
        open_source(str(tmp_path / "p-{0..1}.tar"))
    with pytest.raises(DataError, match="wanted a pattern"):
        open_source(str(tmp_path / "p-{0..1.tar"))
    (tmp_path / "text.tar").write_text("just text " * 200)
    with pytest.raises(DataError, match="not a plain tar file"):
        open_source(str(tmp_path / "text.tar"))
    unlabelled = make_shard(tmp_path / "u.tar", [("0.png", png(0, 0)), ("0.txt", b"caption")])
    with pytest.raises(DataError, match=r"0 has no \.cls \(1 of 1"):
        open_source(str(unlabelled))
    with pytest.raises(DataError, match="no images"):
        open_source(str(make_shard(tmp_path / "e.tar", [("0.txt", b"caption")])))


def test_bad_numbers_and_splits_are_errors() -> None:
    with pytest.raises(DataError, match="limit of 0"):
        open_source("scenes:val", limit=0)
    with pytest.raises(DataError, match="no split 'vall'; did you mean val"):
        open_source("scenes:vall")
    with pytest.raises(DataError, match="cannot take 0 scenes"):
        open_source("scenes:val", scenes=0)


@pytest.mark.parametrize(
    ("name", "said"), [("a.tar.gz", "uncompressed .tar: unpack it"), ("a.txt", "a file; ")]
)
def test_a_file_that_is_no_tar_is_not_called_absent(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        open_source(str(tmp_path / name))


def test_a_teacher_cache_tells_what_is_no_sample(tmp_path: Path, make_shard: Shard, png: Png) -> None:
    path = make_shard(tmp_path / "s.tar", [("0.png", png(0, 0)), ("img.v1.png", png(0, 1))])
    told: list[str] = []
    open_images(DataConfig(shards=(str(path),)), told.append)
    assert len(told) == 1 and told[0].startswith(
        "s.tar: 1 members end in an image's ending and are not samples"
    )

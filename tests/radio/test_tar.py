"""Shards from anywhere: the members that samples are made of, or one error."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radio.errors import DataError
from radio.tar import UNREADABLE, index_shard
from train.data.shards import LeftOut

Shard = Callable[..., Path]


def samples(path: Path, **options: bool) -> dict[str, tuple[str, bytes]]:
    """Key to class and bytes."""
    content = path.read_bytes()
    return {
        found.key: (found.label, content[found.offset : found.offset + found.size])
        for found in index_shard(path, **options).samples
    }


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) % 8**6)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


def test_keys_end_at_the_first_dot(tmp_path, make_shard: Shard):
    members = [
        ("0001.jpg", b"a"), ("0001.cls", b"7"), ("0001.seg.png", b"mask"),  # the mask is no image
        ("0001.seg.cls", b"8"), ("0.in.jpg", b"a"), ("0.cls", b"1"),
        ("img.v1.0002.jpg", b"b"), ("img.v1.0002.cls", b"8\n"),
        ("img.v1.0003.JPG", b"c"), ("img.v1.0003.cls", "\ufeff9".encode()),
        ("v1.5/0004.png", b"d"), ("v1.5/0004.cls", b"7"), ("._0001.jpg", b"a Mac's"), ("0001.json", b"{}"),
    ]  # fmt: skip
    path = make_shard(tmp_path / "s.tar", members)
    assert samples(path) == {"0001": ("7", b"a"), "v1.5/0004": ("7", b"d")}
    assert index_shard(path).left_out == ["0.in.jpg", "img.v1.0002.jpg", "img.v1.0003.JPG"]
    with tarfile.open(path) as tar:
        judged = LeftOut()  # what training takes and leaves out
        taken = [member.name for member in tar if judged.see(member.name)]
        judged.end()
    assert (taken, judged.count) == (["0001.jpg", "v1.5/0004.png"], 3)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("0.jpg", b"a"), ("0.png", b"b"), ("0.cls", b"1")], "0.jpg and 0.png are two images of one key"),
        ([("0.jpg", b"a"), ("0.cls", b"1"), ("0.jpg", b"b")], "holds 0.jpg twice"),
        ([("0.jpg", b"a"), ("0.cls", b"1"), ("./0.jpg", b"b")], "holds 0.jpg twice"),
        ([("0.jpg", b"a"), ("0.cls", b"1"), ("0.CLS", b"2")], r"0.CLS: a second class for 0"),
        ([("0.jpg", b"a"), ("0.cls", b"1\n2")], "0.cls: holds several lines"),
        ([("0.jpg", b"a"), ("0.cls", b"\xff")], r"0.cls: is not UTF-8 text \(byte 0: 0xff\)"),
        ([("0.jpg", b"a"), ("0.cls", bytes(5000))], "0.cls: has 5,000 bytes; wanted the name of a class"),
    ],
)
def test_members_that_contradict_one_another(tmp_path, make_shard: Shard, members, said):
    with pytest.raises(DataError, match=said):
        index_shard(make_shard(tmp_path / "s.tar", members))


def test_links_stand_for_what_they_lead_to(tmp_path):
    path = tmp_path / "s.tar"
    links = [("1.jpg", tarfile.LNKTYPE, "0.jpg"), ("d/2.jpg", tarfile.SYMTYPE, "../1.jpg"),
             ("3.jpg", tarfile.SYMTYPE, "gone.jpg"), ("4.jpg", tarfile.SYMTYPE, "4.jpg")]  # fmt: skip
    parts = [header("0.jpg", 3) + padded(b"abc")]
    parts += [header(name, 0, kind, target) for name, kind, target in links]
    path.write_bytes(b"".join(parts) + END)
    found = {sample.key: sample for sample in index_shard(path, labelled=False).samples}
    assert [(found[key].offset, found[key].size) for key in ("1", "d/2")] == [(512, 3)] * 2
    assert found["3"].size == found["4"].size == UNREADABLE


@pytest.mark.parametrize("size", [-512, -1024, -(10**9), -1, 2000, 10**12, 10**15, 2**63 - 1, 2**70])
def test_sizes_that_cannot_be(tmp_path, size):
    path = tmp_path / "s.tar"
    path.write_bytes(header("0.jpg", 3) + padded(b"abc") + header("1.jpg", size) + padded(b"abc") + END)
    with pytest.raises(DataError, match=r"s\.tar: .*(truncated or damaged|damaged one)"):
        index_shard(path)


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" path=x.jpg\n",
        b"20 size=-512\n",
        b"30 size=1000000000000000\n",
        b"12 GNU.sparse.major=1\n",
        b"garbage",
        b"25 size=" + b"9" * 5000 + b"\n",
    ],
)
def test_extended_headers_that_cannot_be(tmp_path, records):
    path = tmp_path / "s.tar"
    extended = header("pax", len(records), tarfile.XHDTYPE) + padded(records)
    path.write_bytes(extended + header("1.jpg", 3) + padded(b"abc") + END)
    try:
        found = index_shard(path, labelled=False).samples
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017 (both are right)
    else:
        assert [sample.key for sample in found] == ["1"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_of_gigabytes_is_not_read(tmp_path, kind):
    path = tmp_path / "s.tar"
    path.write_bytes(header("x", 1 << 40, kind) + padded(b"abc"))
    os.truncate(path, 1 << 41)
    with pytest.raises(DataError, match="a header of 1099511627776 bytes"):
        index_shard(path)


def test_archives_that_are_not_whole(tmp_path, make_shard: Shard):
    members = [(f"{n}.{ending}", b"1" * 600) for n in range(3) for ending in ("jpg", "txt")]
    path = make_shard(tmp_path / "s.tar", members)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"0 has no \.cls"):
        index_shard(path)
    for end in (1536, 1800, 1536 + 512, 2 * 1536, 6 * 1536):  # the last: all but the end mark
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"damaged one|truncated or damaged"):
            index_shard(path, labelled=False)
    path.write_bytes(whole[:1536] + b"#" * 512 + whole[2048:])
    with pytest.raises(DataError, match="a damaged header at byte 1536"):
        index_shard(path, labelled=False)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="are these two tar files in one"):
        index_shard(path, labelled=False)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(DataError, match="is no regular file; wanted a tar file"):
        index_shard(tmp_path / "s.tar")
    with pytest.raises(DataError, match="not a plain tar file"):
        index_shard(tmp_path / "gone.tar")


def whole_shard() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("é" * 60 + ".jpg", b"abc"), ("b" * 120 + ".jpg", b"x" * 600), ("0.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue().rstrip(b"\0") + END


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_shards_give_places_inside_the_file_or_one_error(tmp_path, data):
    content = bytearray(padded(whole_shard()))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) // 512 - 1)) * 512
        at = start + data.draw(st.sampled_from([0, 124, 156, 345]))  # name, size, kind, prefix
        spoilt = [b"\x80" + b"\xff" * 7, b"\xff" * 8, b"7" * 8, b"S" * 8, b"x"]
        content[at : at + 8] = data.draw(st.sampled_from(spoilt)).ljust(8, b"\0")
        if data.draw(st.booleans()):  # a checksum that fits, so that the rest is believed
            block = content[start : start + 512]
            block[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % (sum(block) % 8**6)
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    try:
        found = index_shard(path, labelled=False).samples
    except DataError as error:
        assert "s.tar: " in str(error)  # noqa: PT017 (both are right)
    else:
        assert all(sample.offset + max(sample.size, 0) <= len(content) for sample in found)

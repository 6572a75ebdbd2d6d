"""Members are those that the standard library finds; damage has a cause; one can go on from any header."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, strategies
from hypothesis import settings as effort

from train.data.errors import ShardError
from train.data.tar import TarStream

from .conftest import pack


class Stream(io.BytesIO):
    """Bytes that cannot be sought, like a pipe's."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise OSError("a pipe")


LONG = "a/" + "long-" * 40 + "name.jpg"
FILES = [("000.jpg", b"x" * 700), (LONG, b"y" * 512), ("ü/002.jpg", b""), ("003.txt", b"z" * 10)]


def read_into(found: list[tuple[str, bytes]], tar: TarStream) -> None:
    while (member := tar.next()) is not None:
        found.append((member.name, tar.read(member)))


def everything(tar: TarStream) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    read_into(found, tar)
    return found


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("opened", [io.BytesIO, Stream])
def test_members_are_those_of_the_standard_library(
    tmp_path: Path, kind: int, opened: type[io.BytesIO]
) -> None:
    files = [file for file in FILES if kind != tarfile.USTAR_FORMAT or file[0] != LONG]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "000.jpg"
        tar.addfile(folder)
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            tar.addfile(link)
    with tarfile.open(path) as tar:
        wanted = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    assert wanted == files
    assert everything(TarStream(opened(path.read_bytes()))) == files


@pytest.mark.parametrize("opened", [io.BytesIO, Stream])
def test_one_can_go_on_after_every_member(tmp_path: Path, opened: type[io.BytesIO]) -> None:
    data = pack(tmp_path / "a.tar", FILES, format=tarfile.PAX_FORMAT).read_bytes()
    tar = TarStream(opened(data))
    for number in range(len(FILES)):
        member = tar.next()  # passed over without being read
        assert member is not None
        rest = opened(data[member.end :]) if opened is Stream else opened(data)
        if opened is not Stream:
            rest.seek(member.end)
        assert everything(TarStream(rest, member.end)) == FILES[number + 1 :]
    assert tar.next() is None


@pytest.mark.parametrize("opened", [io.BytesIO, Stream])
@pytest.mark.parametrize(
    ("cut", "read"),
    [(512 + 100, 0), (512 + 1024 + 100, 1), (512 + 1024, 1), (-1024, 4), (-1000, 4)],
    ids=["in-a-file", "in-a-header", "between", "no-end-mark", "half-an-end-mark"],
)
def test_a_cut_archive_gives_what_is_whole(
    tmp_path: Path, opened: type[io.BytesIO], cut: int, read: int
) -> None:
    data = pack(tmp_path / "a.tar", FILES).read_bytes()
    whole = len(data.rstrip(b"\0"))
    end = -(-whole // 512) * 512
    tar = TarStream(opened(data[: end + 1024 + cut] if cut < 0 else data[:cut]))
    found: list[tuple[str, bytes]] = []
    with pytest.raises(ShardError, match="ends at byte") as caught:
        read_into(found, tar)
    assert caught.value.cause == "truncated"
    assert found == FILES[:read]


def test_no_archive_and_a_damaged_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="an empty file") as caught:
        TarStream(io.BytesIO()).next()
    assert caught.value.cause == "empty"
    with pytest.raises(ShardError, match="not a plain tar file") as caught:
        TarStream(io.BytesIO(b"this is text" * 100)).next()
    assert caught.value.cause == "unreadable"
    data = bytearray(pack(tmp_path / "a.tar", FILES).read_bytes())
    data[512 + 1024 : 512 + 1024 + 100] = b"?" * 100
    tar = TarStream(io.BytesIO(data))
    assert tar.next() is not None
    with pytest.raises(ShardError, match="a damaged header at byte 1536") as caught:
        tar.next()
    assert caught.value.cause == "unreadable"
    assert TarStream(io.BytesIO(bytes(10240))).next() is None  # an archive of nothing


def header(name: str = "0.jpg", size: int = 3, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One header; a size that octal digits cannot hold is written as GNU tar does."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108], block[156:157] = b"0000644\0", kind
    if 0 <= size < 8**11:
        block[124:136] = b"%011o\0" % size
    elif size < 0:
        block[124:136] = size.to_bytes(12, "big", signed=True)
    else:
        block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(records), kind) + records + bytes(-len(records) % 512)


def record(key: bytes, value: bytes) -> bytes:
    body = b" %b=%b\n" % (key, value)
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size += 1
    return b"%d%b" % (size, body)


WHOLE = header() + b"abc" + bytes(509)
END = bytes(1024)
TOO_LARGE = r"a damaged header at byte \d+ \(a member of .* bytes\)"
DAMAGED = [
    ("negative", header(size=-512) + END, TOO_LARGE),
    ("very negative", header(size=-(10**9)) + END, TOO_LARGE),
    ("2^63", header(size=2**63) + END, TOO_LARGE),
    ("2^70", header(size=2**70) + END, TOO_LARGE),
    ("negative text", header("a.txt", size=-1024) + END, TOO_LARGE),
    ("pax of 10^15", header("pax", 10**15, tarfile.XHDTYPE) + END, TOO_LARGE),
    ("pax of 10^9", header("pax", 10**9, tarfile.XHDTYPE) + END, "an extended header of 1000000000 bytes"),
    ("name of 10^9", header("x", 10**9, tarfile.GNUTYPE_LONGNAME) + END, "an extended header of 10000"),
    ("pax without length", extended(b"path=a.jpg\n") + WHOLE, "a record of an extended header"),
    ("pax length of 5000 digits", extended(b"9" * 5000 + b" path=a\n") + WHOLE, "a record of an ext"),
    ("pax length of 0", extended(b"0 path=a.jpg\n") + WHOLE, "a record of an extended header"),
    ("pax length beyond", extended(b"999999 path=a.jpg\n") + WHOLE, "a record of an extended header"),
    ("pax length within", extended(b"5 path=a.jpg\n") + WHOLE, "a record of an extended header"),
    ("pax size of words", extended(record(b"size", b"many")) + WHOLE, "a size of many"),
    ("pax size below 0", extended(record(b"size", b"-512")) + WHOLE, "a size of -512"),
    ("pax size of 5000 digits", extended(record(b"size", b"9" * 5000)) + WHOLE, "a size of 99999999"),
    ("pax size of 10^17", extended(record(b"size", b"1" + b"0" * 17)) + WHOLE, TOO_LARGE),
    ("long pax name", extended(record(b"path", b"a" * 5000)) + WHOLE, "a name of 5000 bytes"),
    ("long gnu name", extended(b"a" * 5000, tarfile.GNUTYPE_LONGNAME) + WHOLE, "a name of 5000 bytes"),
    ("sparse", header(kind=tarfile.GNUTYPE_SPARSE) + END, r"a sparse file at byte \d+; pack it without"),
    ("pax sparse", extended(record(b"GNU.sparse.major", b"1")) + WHOLE, "a sparse file at byte"),
    ("bad checksum", b"x" + header()[1:] + END, r"a damaged header at byte \d+"),
]


@pytest.mark.parametrize("opened", [io.BytesIO, Stream])
@pytest.mark.parametrize(("data", "said"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_a_header_that_cannot_be_is_damage(opened: type[io.BytesIO], data: bytes, said: str) -> None:
    tar = TarStream(opened(WHOLE + data))
    found: list[tuple[str, bytes]] = []
    with pytest.raises(ShardError, match=said) as caught:
        read_into(found, tar)
    assert found == [("0.jpg", b"abc")]
    assert caught.value.cause == "unreadable"
    assert len(str(caught.value)) < 200
    assert tar.position == len(WHOLE)  # of the first header of what is damaged


def test_a_large_member_is_passed_over_and_ends_the_archive() -> None:
    for opened in (io.BytesIO, Stream):
        tar = TarStream(opened(WHOLE + header("1.jpg", 10**12) + END))
        assert tar.next() is not None
        member = tar.next()
        assert member is not None
        assert member.size == 10**12
        with pytest.raises(ShardError, match="ends at byte 2560") as caught:
            tar.next()
        assert caught.value.cause == "truncated"


def test_an_extended_size_goes_before_the_headers() -> None:
    """As with files of 8 GB and more, whose size the header of the pax format cannot hold."""
    data = extended(record(b"size", b"700") + record(b"path", b"a.jpg")) + header("x", 0)
    data += b"y" * 700 + bytes(324) + WHOLE + END
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.size) for m in tar] == [("a.jpg", 700), ("0.jpg", 3)]
    assert everything(TarStream(io.BytesIO(data))) == [("a.jpg", b"y" * 700), ("0.jpg", b"abc")]


def test_links_are_counted() -> None:
    data = header("a.jpg", 0, tarfile.SYMTYPE) + WHOLE + header("b.jpg", 3, tarfile.LNKTYPE) + END
    tar = TarStream(io.BytesIO(data))
    assert everything(tar) == [("0.jpg", b"abc")]
    assert (tar.num_links, tar.first_link) == (2, "a.jpg")


@pytest.mark.parametrize(
    ("start", "method"),
    [(b"\x1f\x8b\x08", "gzip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"(\xb5/\xfd", "zstd")],
)
def test_a_compressed_archive_is_told(start: bytes, method: str) -> None:
    with pytest.raises(ShardError, match=rf"compressed by {method}; read it by a pipe:"):
        TarStream(io.BytesIO(start + bytes(100))).next()


KINDS = [
    getattr(tarfile, name) for name in dir(tarfile) if name.endswith("TYPE") or name.startswith("GNUTYPE_")
]
SIZES = strategies.sampled_from([0, 1, 3, 512, 513, 8**11, 10**12, 2**63, 2**70, -1, -512, -(10**9)])
PARTS = strategies.one_of(
    strategies.builds(
        lambda size, kind, data: header("a.jpg", size, kind) + data,
        SIZES,
        strategies.sampled_from(KINDS),
        strategies.binary(max_size=600),
    ),
    strategies.builds(
        extended,
        strategies.lists(
            strategies.one_of(
                strategies.binary(max_size=20),
                strategies.builds(
                    record, strategies.sampled_from([b"path", b"size", b"x"]), strategies.binary(max_size=9)
                ),
            ),
            max_size=4,
        ).map(b"".join),
        strategies.sampled_from([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME]),
    ),
    strategies.just(WHOLE),
    strategies.just(END),
    strategies.binary(max_size=1100),
)


@effort(max_examples=200, deadline=None)
@given(parts=strategies.lists(PARTS, max_size=8), opened=strategies.sampled_from([io.BytesIO, Stream]))
def test_any_bytes_are_members_or_damage(parts: list[bytes], opened: type[io.BytesIO]) -> None:
    data = b"".join(parts)
    tar = TarStream(opened(data))
    end = 0
    try:
        while (member := tar.next()) is not None:
            assert end < member.start <= member.end
            end = member.end
            if member.end <= len(data):
                assert tar.read(member) == data[member.start : member.start + member.size]
    except ShardError:
        pass

"""Members are those that the standard library finds; damage has a cause; one can go on from any header."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from train.data.faults import ShardError
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

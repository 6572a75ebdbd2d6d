"""The members of a tar stream, one after another, from any of their beginnings on.

The standard library's reader hides where damage begins: a broken header in the middle is the end of the
archive to it. Here every member says where it and its successor lie, and damage has a cause.
"""

from __future__ import annotations

import tarfile
from typing import IO, NamedTuple

from .faults import ShardError

_BLOCK = 512
_SKIPPED_AT_ONCE = 1 << 20  # bytes of a stream that cannot seek
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_BARE = (  # headers that no bytes follow, whatever size they name
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
)


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    size: int
    start: int  # where its bytes begin
    end: int  # where the next header begins


class TarStream:
    """A tar archive read forwards.

    Args:
        stream: the archive, standing at `position`.
        position: byte position of a header, or 0.
    """

    def __init__(self, stream: IO[bytes], position: int = 0) -> None:
        self._stream, self._position, self._next = stream, position, position
        self.seeks = stream.seekable()  # whether `jump` is possible

    def close(self) -> None:
        """Let go of the stream."""
        self._stream.close()

    @property
    def position(self) -> int:
        """Where the next header begins."""
        return self._next

    def jump(self, position: int) -> None:
        """Go on from another header."""
        assert self.seeks, "what comes through a pipe is read forwards"
        self._next = position

    def next(self) -> Member | None:
        """The next file; None at the end of the archive.

        Raises:
            ShardError: no tar archive, a damaged header, or the archive ends early.
            OSError: the stream fails.
        """
        name: str | None = None
        while True:
            self._skip_to(self._next)
            info = self._header()
            if info is None:
                return None
            start = self._position
            self._next = start if info.type in _BARE else start + -(-info.size // _BLOCK) * _BLOCK
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = _text(self._exactly(info.size)).rstrip("\0")
            elif info.type == tarfile.XHDTYPE:
                name = _pax_path(self._exactly(info.size)) or name
            elif info.type in _FILES:
                return Member(name or info.name, info.size, start, self._next)
            elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                name = None

    def read(self, member: Member) -> bytes:
        """The bytes of the member that `next` gave last.

        Raises:
            ShardError: the archive ends within them.
            OSError: the stream fails.
        """
        assert self._position == member.start, "a member is read once, before the next"
        return self._exactly(member.size)

    def _skip_to(self, position: int) -> None:
        if self.seeks and self._position != position:
            self._stream.seek(position)
            self._position = position
        while self._position < position:
            passed = len(self._stream.read(min(position - self._position, _SKIPPED_AT_ONCE)))
            self._position += passed
            if not passed:
                raise ShardError("truncated", f"ends at byte {self._position}")

    def _header(self) -> tarfile.TarInfo | None:
        at = self._position
        block = self._stream.read(_BLOCK)
        self._position += len(block)
        if not block and not at:
            raise ShardError("empty", "an empty file")
        if len(block) < _BLOCK:
            raise ShardError("truncated", f"ends at byte {self._position} without an end mark")
        if block.count(0) == _BLOCK:
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            what = f"a damaged header at byte {at}" if at else "not a plain tar file"
            raise ShardError("unreadable", f"{what} ({error})") from error

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        if len(data) < size:
            raise ShardError("truncated", f"ends at byte {self._position} within a file")
        return data


def _pax_path(records: bytes) -> str | None:
    """The path in an extended header, whose records are `LENGTH path=NAME` lines."""
    at = 0
    while at < len(records):
        length, _, rest = records[at:].partition(b" ")
        if not length.isdigit() or not int(length):
            return None
        name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if name == b"path":
            return _text(value)
        at += int(length)
    return None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

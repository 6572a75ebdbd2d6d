"""A tar reader that goes from member to member, starting at any header.

The standard library's reader hides where damage begins: it takes a broken header in the middle for the end
of the archive. Here every member has its own and its successor's position, and damage has a cause.
"""

from __future__ import annotations

import io
import re
import tarfile
from typing import IO, NamedTuple

from radio.errors import shown

from .errors import ShardError

_BLOCK = 512
_SKIPPED_AT_ONCE = 1 << 20  # bytes, in a stream that cannot seek
_LARGEST = 1 << 40  # bytes of a member, an upper bound: they may have to be skipped
_LARGEST_HEADER = 1 << 20  # bytes of an extended header, as in libarchive; it is read into memory
_LONGEST_NAME = 1 << 12  # bytes, of a path
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_BARE = (  # headers without data, whatever size they name
    *_LINKS,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FOR_THE_NEXT = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_PAX_SIZE = re.compile(rb"\d{1,18}")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarMember(NamedTuple):
    """One file of an archive."""

    name: str
    size: int
    start: int  # position of its data
    end: int  # position of the next header


class _Extended(NamedTuple):
    """Name and size that extended headers give for the next member."""

    name: str | None = None
    size: int | None = None


class TarStream:
    """A tar archive, read forwards.

    Args:
        stream: the archive, already at `position`.
        position: byte position of a header, or 0.
    """

    def __init__(self, stream: IO[bytes], position: int = 0) -> None:
        self._stream, self._position, self._next = stream, position, position
        self.seeks = stream.seekable()  # whether `jump` is possible
        self.num_links, self.first_link = 0, ""  # links skipped so far: they have no data
        self._length: int | None = None
        if self.seeks:
            self._length = stream.seek(0, io.SEEK_END)
            stream.seek(position)

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    @property
    def position(self) -> int:
        """Position of the next header."""
        return self._next

    def jump(self, position: int) -> None:
        """Continue at another header."""
        assert self.seeks, "what comes through a pipe is read forwards"
        self._next = position

    def next(self) -> TarMember | None:
        """Read the next file's header; None at the end of the archive.

        Raises:
            ShardError: not a tar archive, a damaged header, or an early end; `position` is unchanged.
            OSError: the stream fails.
        """
        begin = self._next
        try:
            return self._next_file()
        except ShardError:
            self._next = begin
            raise

    def _next_file(self) -> TarMember | None:
        known = _Extended()
        while True:
            self._skip_to(self._next)
            at = self._position
            info = self._header()
            if info is None:
                return None
            size = info.size if known.size is None or info.type in _FOR_THE_NEXT else known.size
            if not 0 <= size <= _LARGEST:
                raise _damaged(at, f"a member of {_short(size)} bytes")
            start = self._position
            self._next = start if info.type in _BARE else start + -(-size // _BLOCK) * _BLOCK
            if info.type in _FILES:
                return TarMember(known.name or info.name, size, start, self._next)
            known = self._extend(known, info, at)

    def read(self, member: TarMember) -> bytes:
        """Read the data of the member that `next` returned last.

        Raises:
            ShardError: the archive ends within them.
            OSError: the stream fails.
        """
        assert self._position == member.start, "a member is read once, before the next"
        return self._exactly(member.size)

    def _extend(self, known: _Extended, info: tarfile.TarInfo, at: int) -> _Extended:
        """Update what is known of the next file after a header that is not a file's."""
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return known._replace(name=_name(self._extension(info, at).rstrip(b"\0"), at))
        if info.type in _PAX:
            return _from_pax(known, self._extension(info, at), at)
        if info.type in _FOR_THE_NEXT:
            return known
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(at)
        if info.type in _LINKS:
            self.num_links += 1
            self.first_link = self.first_link or known.name or info.name
        return _Extended()

    def _extension(self, info: tarfile.TarInfo, at: int) -> bytes:
        if info.size > _LARGEST_HEADER:
            raise _damaged(at, f"an extended header of {info.size} bytes, the limit is {_LARGEST_HEADER}")
        return self._exactly(info.size)

    def _skip_to(self, position: int) -> None:
        if self._length is not None and self._position != position:
            if position > self._length:
                raise ShardError("truncated", f"ends at byte {self._length} within a file")
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
        if not at and (method := next((_COMPRESSED[m] for m in _COMPRESSED if block.startswith(m)), None)):
            raise ShardError(
                "unreadable", f"not a plain tar file (compressed by {method}; read it by a pipe:)"
            )
        if len(block) < _BLOCK:
            raise ShardError("truncated", f"ends at byte {self._position} without an end mark")
        if block.count(0) == _BLOCK:
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if at:
                raise _damaged(at, str(error)) from error
            raise ShardError("unreadable", f"not a plain tar file ({error})") from error

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        if len(data) < size:
            raise ShardError("truncated", f"ends at byte {self._position} within a file")
        return data


def _from_pax(known: _Extended, records: bytes, at: int) -> _Extended:
    """Parse an extended header of `LENGTH KEY=VALUE` lines and return the updated attributes."""
    place = 0
    while place < len(records) and records[place]:
        match = _PAX_RECORD.match(records, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(records) or records[end - 1 : end] != b"\n":
            raise _damaged(at, "a record of an extended header")
        key, value = match[2], records[match.end() : end - 1]
        if key == b"path":
            known = known._replace(name=_name(value, at))
        elif key == b"size":
            if not _PAX_SIZE.fullmatch(value):
                raise _damaged(at, f"a size of {shown(value[:20].decode('latin-1'))}")
            known = known._replace(size=int(value))
        elif key.startswith(b"GNU.sparse."):
            raise _sparse(at)
        place = end
    return known


def _name(data: bytes, at: int) -> str:
    if len(data) > _LONGEST_NAME:
        raise _damaged(at, f"a name of {len(data)} bytes, the limit is {_LONGEST_NAME}")
    return data.decode("utf-8", "surrogateescape")


def _damaged(at: int, what: str) -> ShardError:
    return ShardError("unreadable", f"a damaged header at byte {at} ({what})")


def _sparse(at: int) -> ShardError:
    return ShardError("unreadable", f"a sparse file at byte {at}; pack it without tar's --sparse")


def _short(number: int) -> str:
    return str(number) if number.bit_length() < 64 else f"2^{number.bit_length() - 1} or more"

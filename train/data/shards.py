"""WebDataset shards by name: patterns spelled out, and a shard opened at a byte position wherever it lies."""

from __future__ import annotations

import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlparse

import braceexpand
from webdataset.gopen import Pipe, gopen, gopen_schemes
from webdataset.tariterators import base_plus_ext

from evals.core.stored import PICTURE_ENDINGS
from radio.errors import ConfigError

from .faults import ShardError
from .tar import TarStream

T = TypeVar("T")

_WAITS = (1.0, 5.0, 30.0)  # seconds before another attempt at a server
_PATIENCE = 60.0  # seconds without an answer
_PARTIAL, _NO_SUCH_RANGE, _GONE = 206, 416, (401, 403, 404, 410)
_READ_AHEAD = 1 << 18
_SKIPPED_AT_ONCE = 1 << 20


def expand(patterns: Iterable[str]) -> tuple[str, ...]:
    """The names of the shards that patterns, folders, pipes and URLs stand for, in order.

    Raises:
        ConfigError: braces that do not match, a folder without tar files, an unknown scheme, or no names.
    """
    names: list[str] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(map(str, Path(pattern).glob("*.tar")))
            if not found:
                raise ConfigError(
                    f"{pattern}: a folder without tar files; name a folder of shards, or FILES.tar"
                )
        else:
            found = _spelled_out(pattern)
        names += found
    return tuple(names)


def short_name(name: str) -> str:
    """What identifies a shard wherever the set of shards is kept: its last part."""
    return name.rstrip(" -").rpartition("/")[2]


class Outline(NamedTuple):
    """Where the pictures of a shard are."""

    pictures: tuple[int, ...]  # the byte of each one's header
    end: int  # the byte where the archive ends, or is damaged


@lru_cache(maxsize=256)
def outline(name: str) -> Outline:
    """Where the pictures of a shard on this machine are; only headers are read.

    Raises:
        ShardError: it is missing.
        OSError: it cannot be read.
    """
    tar, pictures = open_shard(name), []
    with suppress(ShardError):  # who comes to the end meets it again
        at = tar.position
        while (member := tar.next()) is not None:
            if is_picture(member.name):
                pictures.append(at)
            at = tar.position
    end = tar.position
    tar.close()
    return Outline(tuple(pictures), end)


def is_picture(name: str) -> bool:
    """Whether a member of a shard is a picture, by its ending from the first dot on."""
    prefix, ending = base_plus_ext(name)
    return prefix is not None and f".{ending.lower()}" in PICTURE_ENDINGS


def open_shard(name: str, position: int = 0) -> TarStream:
    """The archive of this name from a byte position on.

    A local file is sought, a server is asked for the rest; what comes through a pipe is passed over.

    Raises:
        ShardError: it is missing, cannot be opened, or ends before.
    """
    try:
        return TarStream(_opened(name, position), position)
    except FileNotFoundError as error:
        raise ShardError("missing", "no such shard") from error
    except OSError as error:
        raise ShardError("unreadable", str(error)) from error


def _opened(name: str, position: int) -> IO[bytes]:
    scheme = _scheme(name)
    if scheme in ("", "file"):
        return _file(name, position)
    if scheme in ("http", "https"):
        return io.BufferedReader(cast(io.RawIOBase, Served(name, position)), _READ_AHEAD)
    return cast(IO[bytes], Piped(gopen(name, "rb", bufsize=_READ_AHEAD), position))


def _file(name: str, position: int) -> IO[bytes]:
    path = Path(name.removeprefix("file://").removeprefix("file:"))
    file = path.open("rb", buffering=_READ_AHEAD)
    file.seek(position)
    return file


class Piped:
    """What a command gives, from a position on; that it may be stopped early is no fault of its."""

    def __init__(self, pipe: Pipe, position: int) -> None:
        self._pipe = pipe
        while position:
            passed = len(self.read(min(position, _SKIPPED_AT_ONCE)))
            position -= passed
            if not passed:
                self.close()
                raise ShardError("truncated", f"ends {position} bytes before where it was left")

    def seekable(self) -> bool:
        """Never."""
        return False

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end.

        Raises:
            OSError: the command has failed, once everything that it gave is read.
        """
        data: bytes = self._pipe.stream.read(size)
        if len(data) < size:
            self._pipe.wait_for_child()
        return data

    def close(self) -> None:
        """Stop the command."""
        self._pipe.stream.close()
        self._pipe.proc.kill()  # a loader's signals are blocked, and its commands inherit that
        self._pipe.proc.wait()


class Served(io.RawIOBase):
    """A file on a web server from a position on, asked for again where the connection breaks."""

    def __init__(self, url: str, position: int) -> None:
        super().__init__()
        self._url, self._position = url, position
        self._end: int | None = None
        self._answer: HTTPResponse | None = None
        _patiently(self._ask)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """How many bytes were put into a buffer; 0 at the end of the file.

        Raises:
            OSError: the server does not answer, or no longer has the file.
        """
        return _patiently(lambda: self._read(buffer))

    def close(self) -> None:
        """Hang up."""
        self._hang_up()
        super().close()

    def _read(self, buffer: Any) -> int:
        if self._answer is None and self._position != self._end:
            self._ask()
        try:
            count = self._answer.readinto(buffer) if self._answer is not None else 0
            if not count and self._end is not None and self._position < self._end:
                raise OSError(f"the connection ended at byte {self._position} of {self._end}")
        except (OSError, HTTPException) as error:
            self._hang_up()
            raise OSError(str(error)) from error
        self._position += count
        return count

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def _ask(self) -> None:
        """Ask the server for what comes from the position on."""
        request = urllib.request.Request(self._url)
        if self._position:
            request.add_header("Range", f"bytes={self._position}-")
        try:
            answer = cast(HTTPResponse, urllib.request.urlopen(request, timeout=_PATIENCE))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == _NO_SUCH_RANGE:
                self._end = self._position
                return
            raise (FileNotFoundError if error.code in _GONE else OSError)(str(error)) from error
        length = answer.headers.get("Content-Length")
        begins = self._position if answer.status == _PARTIAL else 0
        self._answer, self._end = answer, begins + int(length) if length else None
        if begins != self._position:  # the server sends the whole file
            _pass_over(answer, self._position)


def _patiently(action: Callable[[], T]) -> T:
    """What an action gives, tried again after a while where the network fails it."""
    for wait in _WAITS:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait)
    return action()


def _pass_over(answer: HTTPResponse, left: int) -> None:
    while left and (passed := len(answer.read(min(left, _SKIPPED_AT_ONCE)))):
        left -= passed


def _spelled_out(pattern: str) -> list[str]:
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise ConfigError(
            f"{pattern}: {error}; wanted a pattern such as photos-{{000000..000003}}.tar"
        ) from error
    scheme = _scheme(names[0])
    if scheme == "s3":
        raise ConfigError(f"{pattern}: read S3 through a pipe, as in 'pipe:aws s3 cp {pattern} -'")
    if scheme not in ("", "file") and scheme not in gopen_schemes:
        known = ", ".join(sorted(name for name in gopen_schemes if name != "__default__"))
        raise ConfigError(
            f"{pattern}: the scheme {scheme}: is not one of {known}; give a file, or pipe:COMMAND"
        )
    return names


def _scheme(name: str) -> str:
    if name.startswith("pipe:"):
        return "pipe"
    return urlparse(name).scheme

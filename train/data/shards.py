"""WebDataset shards by name: expand patterns, and open a local or remote shard at a byte position."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from webdataset.tariterators import base_plus_ext

from radio.errors import ConfigError, shown
from radio.images import IMAGE_ENDINGS
from radio.io import MAX_NAMES, MAX_NAMES_LETTERS, expand_braces
from radio.tar import dots_note

from .faults import ShardError
from .remote import check_installed, check_url, open_remote, scheme_of
from .tar import TarStream

_READ_AHEAD = 1 << 18


def expand(patterns: Iterable[str]) -> tuple[str, ...]:
    """Expand patterns, folders, pipes and URLs to the names of shards, in order.

    Raises:
        ConfigError: braces do not match, there are too many names, a folder has no tar files, a scheme is
            unknown, a URL is not plain, or a name is empty.
    """
    names: list[str] = []
    letters = 0
    for pattern in patterns:
        found = _names(pattern)
        for name in found:
            if scheme_of(name):
                check_url(name, pattern)
        for scheme in sorted({*map(scheme_of, found)}):
            check_installed(scheme)
        names += found
        letters += sum(map(len, found))
        if len(names) > MAX_NAMES or letters > MAX_NAMES_LETTERS:
            raise ConfigError(
                f"more than {MAX_NAMES:,} shards, or {MAX_NAMES_LETTERS:,} letters in their names; pack more "
                f"images into each"
            )
    return tuple(names)


def runs_program(pattern: str) -> str | None:
    """Return the command that a pattern of shards would run in a shell; None when there is none.

    The other schemes start at most a fixed program, without a shell, with the URL as one argument.

    Raises:
        ConfigError: as `expand`.
    """
    return next((name[len("pipe:") :] for name in _names(pattern) if scheme_of(name) == "pipe"), None)


def _names(pattern: str) -> list[str]:
    if _is_folder(pattern):
        found = sorted(map(str, Path(pattern).glob("*.tar")))
        if not found:
            raise ConfigError(
                f"{shown(pattern)}: a folder without tar files; name a folder of shards, or FILES.tar"
            )
        # Entries of a folder are files, even one named pipe:COMMAND.tar.
        return [f"./{name}" if scheme_of(name) else name for name in found]
    names = expand_braces(pattern, error=ConfigError)
    if any(not name or "\0" in name for name in names):
        raise ConfigError(f"{shown(pattern)!r}: names a shard without a name; give FILES.tar")
    return names


def _is_folder(pattern: str) -> bool:
    if not pattern or scheme_of(pattern):
        return False
    try:
        return Path(pattern).is_dir()
    except OSError:  # a pattern longer than a path may be
        return False


def short_name(name: str) -> str:
    """Return the last part of a shard's name, which identifies it wherever the shards are stored."""
    return name.rstrip(" -").rpartition("/")[2]


class Outline(NamedTuple):
    """Positions of the images of a shard."""

    images: tuple[int, ...]  # byte position of each image's header
    end: int  # byte position where the archive ends, or is damaged
    note: str  # about left-out files, see `note_on`


@lru_cache(maxsize=256)
def outline(name: str) -> Outline:
    """Locate the images of a local shard; only headers are read.

    Raises:
        ShardError: it is missing.
        OSError: it cannot be read.
    """
    tar, images, left_out = open_shard(name), [], LeftOut()
    with suppress(ShardError):  # raised again for a reader that comes to the end
        at = tar.position
        while (member := tar.next()) is not None:
            if left_out.see(member.name):
                images.append(at)
            at = tar.position
    end = tar.position
    tar.close()
    return Outline(tuple(images), end, note_on(left_out, tar))


def is_image(name: str) -> bool:
    """Check whether a member of a shard is an image, by its extension from the first dot on."""
    prefix, ending = base_plus_ext(name)
    return prefix is not None and f".{ending.lower()}" in IMAGE_ENDINGS


class LeftOut:
    """The members of a shard with an image's extension that belong to no sample.

    WebDataset's extension begins at the first dot: `a.v1.jpg` is part `v1.jpg` of the sample `a`. Beside
    `a.jpg` that is a mask or a smaller copy; where the sample has no other image, an image was lost.

    Args:
        whole: whether the shard is read from its start; else the first sample's image may come before.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self.count, self.first = 0, ""
        self._sample: str | None = None
        self._has_image = not whole
        self._named: list[str] = []  # the first such member of this sample
        self._number = 0

    def see(self, name: str) -> bool:
        """Record the next member; return whether it is a sample's image."""
        prefix, ending = base_plus_ext(name)
        if prefix is None:
            return False
        if prefix != self._sample:
            if self._sample is not None:
                self.end()
            self._sample = prefix
        if f".{ending.lower()}" in IMAGE_ENDINGS:
            self._has_image = True
            return True
        hidden = name.rpartition("/")[2].startswith(".")
        if name.lower().endswith(IMAGE_ENDINGS) and not hidden:
            self._number += 1
            self._named = self._named or [name]
        return False

    def end(self) -> None:
        """Finish the current sample: count its members if it has no image."""
        if self._named and not self._has_image:
            self.count += self._number
            self.first = self.first or self._named[0]
        self._has_image, self._named, self._number = False, [], 0


def note_on(left_out: LeftOut, tar: TarStream) -> str:
    """Describe what a fully read shard holds besides its samples; empty if nothing."""
    left_out.end()
    notes = []
    if left_out.first:
        notes.append(dots_note(left_out.count, left_out.first))
    if tar.num_links:
        notes.append(
            f"{tar.num_links} members are links, the first is {tar.first_link}; pack with tar --dereference "
            f"--hard-dereference"
        )
    return "; ".join(notes)


def open_shard(name: str, position: int = 0) -> TarStream:
    """Open a shard by name from a byte position on.

    A local file is read from there, a server sends only the rest; of a pipe the bytes before are skipped.

    Raises:
        ShardError: it is missing, cannot be opened, or ends before the position.
    """
    try:
        stream = _file(name, position) if scheme_of(name) in ("", "file") else open_remote(name, position)
        return TarStream(stream, position)
    except FileNotFoundError as error:
        raise ShardError("missing", "no such shard") from error
    except EOFError as error:
        raise ShardError("truncated", str(error)) from error
    except OSError as error:
        raise ShardError("unreadable", error.strerror or str(error)) from error


def _file(name: str, position: int) -> IO[bytes]:
    path = Path(name[len("file:") :].removeprefix("//") if scheme_of(name) else name)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block
        raise ShardError("unreadable", "is no regular file")
    file = path.open("rb", buffering=_READ_AHEAD)
    file.seek(position)
    return file

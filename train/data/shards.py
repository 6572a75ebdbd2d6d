"""WebDataset shards: expand patterns to names, open a shard at a byte position, read a stream's images."""

from __future__ import annotations

import hashlib
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, final

from torch import Tensor
from webdataset.tariterators import base_plus_ext

from radio.errors import ConfigError, DataError, shown
from radio.image_files import as_text
from radio.images import IMAGE_ENDINGS, MAX_IMAGE_BYTES
from radio.io import MAX_NAMES, MAX_NAMES_LETTERS, expand_braces
from radio.tar import dots_note

from ..config import ClusterConfig
from .clusters import Clusters, Probabilities, chance, hash_of, make_clusters
from .crops import View, seed_of, shuffled_index
from .errors import ReadError, ReadStats, ShardError
from .remote import check_installed, check_url, open_remote, scheme_of
from .tar import TarMember, TarStream

_ALIKE = ClusterConfig()
_READ_AHEAD = 1 << 18
_MAX_BARREN = 100  # shards in a row without an image, for one stream
_FEW, _LONG = 3, 600.0  # or fewer, after so many seconds: the network is down


def expand(patterns: Iterable[str]) -> tuple[str, ...]:
    """Expand patterns, folders, pipes and URLs to the names of shards, in order.

    Raises:
        ConfigError: braces do not match, there are too many names, a folder has no tar files, a scheme is
            unknown, a URL is not plain, or a name is empty.
    """
    names: list[str] = []
    letters = 0
    for pattern in patterns:
        new = _names(pattern)
        for name in new:
            if scheme_of(name):
                check_url(name, pattern)
        for scheme in sorted({*map(scheme_of, new)}):
            check_installed(scheme)
        names += new
        letters += sum(map(len, new))
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
        names = sorted(map(str, Path(pattern).glob("*.tar")))
        if not names:
            raise ConfigError(
                f"{shown(pattern)}: a folder without tar files; name a folder of shards, or FILES.tar"
            )
        # Entries of a folder are files, even one named pipe:COMMAND.tar.
        return [f"./{name}" if scheme_of(name) else name for name in names]
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


class ShardIndex(NamedTuple):
    """Positions of the images of a shard."""

    images: tuple[int, ...]  # byte position of each image's header
    end: int  # byte position where the archive ends, or is damaged
    note: str  # about left-out files, see `note_on`


@lru_cache(maxsize=256)
def index_shard(name: str) -> ShardIndex:
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
    return ShardIndex(tuple(images), end, note_on(left_out, tar))


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


def cluster_name(name: str) -> str:
    """Return the name of a shard's file of clusters, without its ending."""
    return short_name(name).removesuffix(".tar")


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


class ShardSample(NamedTuple):
    """A view of one image."""

    pixels: Tensor  # uint8 [3, side, side]
    key: str  # shard and name, or number


@final
class Shards:
    """WebDataset shards; every file with an image's extension is a sample.

    The shards are shuffled in every epoch and dealt to the streams round-robin. If there are fewer shards
    than streams, each is split into as many parts as needed, of every n-th image.

    Args:
        pattern: names them to the user.
        names: all of them, in order.
        config: how to balance clusters of images.

    Raises:
        ConfigError: a setting of `config` is without effect.
        DataError: a shard has no file of clusters.
    """

    count = None

    def __init__(self, pattern: str, names: Sequence[str], config: ClusterConfig = _ALIKE) -> None:
        self.pattern, self.names = pattern, names
        self._clusters = make_clusters(config, [cluster_name(name) for name in dict.fromkeys(names)])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the clusters, and of the shards' names without folders, so that the data can move."""
        text = "\n".join(map(short_name, self.names)) + hash_of(self._clusters)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about the clusters, if there are any."""
        return () if self._clusters is None else (self._clusters.describe(),)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Their entries in a checkpoint's metadata."""
        known = {"path": self.pattern, "fingerprint": self.fingerprint, "shards": len(self.names)}
        return [{**known, "labels_used": False}]

    def open(self, stream: int, num_streams: int, place: Sequence[int], seed: int) -> ShardReader:
        """Open a stream's reader of them at a position."""
        return ShardReader(self.names, stream, num_streams, place, seed, self._clusters)


@final
class ShardReader:
    """One stream's reader of shards; its position is a shard's part, a byte and a number of images."""

    def __init__(
        self,
        names: Sequence[str],
        stream: int,
        num_streams: int,
        place: Sequence[int],
        seed: int,
        clusters: Clusters | None = None,
    ) -> None:
        self._clusters, self._cluster_seed = clusters, seed_of(seed, "cluster", 0)
        self._probabilities: Probabilities | None = None  # of the open shard
        self._rejected = False  # whether an image of the last part was left for its cluster
        self._names, self._stream, self._num_streams, self._seed = names, stream, num_streams, seed
        self._parts = -(-num_streams // len(names))
        self._num_distinct = len(set(names))
        self._unit, self._offset, self._seen = (int(number) for number in place)
        self._tar: TarStream | None = None
        self._left_out = LeftOut()
        self._why = ""  # why the last part gave no further image

    @property
    def place(self) -> tuple[int, int, int]:
        """Finished parts of shards, the byte of the next header, and the images before it."""
        return self._unit, self._offset, self._seen

    def close(self) -> None:
        """Close the shard."""
        if self._tar is not None:
            self._tar.close()
        self._tar = None

    def take(self, view: View, stats: ReadStats) -> ShardSample:
        """Read a view of the next readable image.

        Raises:
            DataError: too many shards in a row had none, or they took too long.
        """
        start = time.monotonic()
        failed: set[str] = set()  # shards without any image
        tried = 0  # parts of shards in a row
        while tried < _MAX_BARREN:
            self._rejected = False
            position, count = self._stream + self._unit * self._num_streams, len(self._names) * self._parts
            unit = shuffled_index(position, count, self._seed)
            name, part = self._names[unit // self._parts], unit % self._parts
            try:
                if (sample := self._next_image(name, part, view, stats)) is not None:
                    return sample
            except (ShardError, OSError) as error:
                self._why = str(error)
                if not self._seen:
                    failed.add(name)
                if part == 0:  # each part's stream meets the damage; only one reports it
                    cause = error.cause if isinstance(error, ShardError) else "unreadable"
                    stats.errors.append(ReadError(cause, name, str(error)))
            self.close()
            self._unit, self._offset, self._seen = self._unit + 1, 0, 0
            tried = 0 if self._rejected else tried + 1
            late = tried >= _FEW and time.monotonic() - start > _LONG
            if late or len(failed) == self._num_distinct:
                break
        raise DataError(
            f"no image in {tried} shards in a row, the last {shown(name)} ({self._why}); check the data"
        )

    def _next_image(self, name: str, part: int, view: View, stats: ReadStats) -> ShardSample | None:
        """Read a view of the next image of a shard's part; None at its end.

        Raises:
            ShardError, OSError: the shard is damaged, or holds no images.
        """
        tar = self._tar or self._open(name, part, stats)
        while (member := self._next_member(tar, name, part)) is not None:
            if self._left_out.see(member.name):
                sample = self._decode(tar, member, name, part, view, stats)
                if sample is not None:
                    return sample
        note = index_shard(name).note if self._jumps(tar) else note_on(self._left_out, tar)
        if not self._seen:
            raise ShardError("empty", f"holds no images{note and f': {note}'}")
        if note and part == 0:
            stats.errors.append(ReadError("left out", name, note))
        return None

    def _open(self, name: str, part: int, stats: ReadStats) -> TarStream:
        """Open a shard at its start, or continue within it."""
        at_start = self._offset == 0
        stats.shards += at_start and part == 0
        self._tar = open_shard(name, self._offset)
        if self._clusters is not None:
            self._probabilities = self._clusters.probabilities(cluster_name(name))
        self._left_out, self._why = LeftOut(whole=at_start), "a stream's part of it holds none"
        if at_start and part == 0 and self._jumps(self._tar) and (note := index_shard(name).note):
            stats.errors.append(ReadError("left out", name, note))  # known beforehand
        return self._tar

    def _jumps(self, tar: TarStream) -> bool:
        return self._parts > 1 and tar.seeks

    def _next_member(self, tar: TarStream, name: str, part: int) -> TarMember | None:
        """Read the next file of the shard, or seek to this part's next image where that is possible."""
        if not self._jumps(tar):
            return tar.next()
        images, end, _ = index_shard(name)
        self._seen = min(self._seen + (part - self._seen) % self._parts, len(images))
        at_end = self._seen == len(images)
        tar.jump(end if at_end else images[self._seen])
        member = tar.next()
        if at_end and member is not None:
            raise ShardError("unreadable", "has been changed while it was read")
        return member

    def _decode(
        self, tar: TarStream, member: TarMember, shard: str, part: int, view: View, stats: ReadStats
    ) -> ShardSample | None:
        """Decode a view of an image; None where it is another stream's, not taken, or cannot be decoded."""
        local = self._seen % self._parts == part
        if local and not self._takes(member.name):
            local, self._rejected = False, True
        small = member.size <= MAX_IMAGE_BYTES
        data = tar.read(member) if local and small else b""
        self._seen, self._offset = self._seen + 1, member.end
        if not local:
            return None
        try:
            if not small:
                raise DataError(f"has {member.size} bytes, and the limit is {MAX_IMAGE_BYTES}")
            return ShardSample(view(data), f"{short_name(shard)}/{member.name}")
        except DataError as error:
            stats.errors.append(ReadError("image", f"{shard}/{member.name}", str(error)))
            self._why = f"its images cannot be decoded: {error}"
            return None

    def _takes(self, member: str) -> bool:
        """Check whether the next image is taken; those of large clusters are left more often.

        Raises:
            DataError: it has no cluster.
        """
        if self._probabilities is None:
            return True
        key, _ = base_plus_ext(member)
        position = self._stream + self._unit * self._num_streams
        return chance(self._cluster_seed, position, self._seen) < self._probabilities.of(as_text(key))

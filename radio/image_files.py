"""Images in a folder or in WebDataset tar shards, listed without reading the images."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar, final

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from .chunks import DamagedError, read_records, write_records
from .errors import DataError, shown
from .images import IMAGE_ENDINGS, MAX_IMAGE_BYTES, decode
from .io import expand_braces
from .progress import ProgressFactory, no_progress
from .tar import UNREADABLE, dots_note, index_shard

T = TypeVar("T")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_HASHED_BYTES = 50 * 10**9
"""A larger data set is identified without its contents: reading ImageNet's 150 GB takes up to an hour."""

_HASHING_THREADS = 4  # hashlib releases the GIL; more threads only compete for the disk
_FINGERPRINT = TypeAdapter(str)
_LOG = logging.getLogger(__name__)


class Entry(NamedTuple):
    """Location of one image's bytes."""

    key: str  # the path inside the folder, or shard and sample name
    label: str  # the class's name
    path: Path
    offset: int
    size: int  # in bytes; `UNREADABLE` for a broken link, or no regular file


class Listing(NamedTuple):
    """The images of a data set, in order."""

    name: str  # the last parts of the folder or pattern
    location: str  # the resolved path or pattern
    classes: tuple[str, ...]  # sorted, numbers by value
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()  # on omitted files


@final
class StoredImages:
    """A listing whose images can be read."""

    def __init__(
        self, listing: Listing, memo: Path | None = None, watch: ProgressFactory = no_progress
    ) -> None:
        self._listing, self._memo, self._watch = listing, memo, watch
        self.name, self.location = listing.name, listing.location
        self.classes, self.notes = listing.classes, listing.notes
        size = sum(entry.size for entry in listing.entries if 0 < entry.size <= MAX_IMAGE_BYTES)  # to hash
        self._is_large = size > MAX_HASHED_BYTES
        if self._is_large:
            note = (
                f"{self.name} has {size / 1e9:,.0f} GB, so its fingerprint is of names, sizes and times of "
                f"files instead of their contents; a copy with other times has another"
            )
            self.notes = (*self.notes, note)
        places = {name: place for place, name in enumerate(listing.classes)}
        self.labels: NDArray[np.int64] = np.array([places[e.label] for e in listing.entries], dtype=np.int64)
        self.keys = tuple(entry.key for entry in listing.entries)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the classes and of every image's key, class and bytes; `files-…` for a large data set.

        Reads every image once; a memo folder caches the result until a file's size or time changes. Above
        `MAX_HASHED_BYTES` the sizes and times of files stand for their bytes, and no image is read.
        """
        if self._is_large:
            return self._hash_files()
        if self._memo is None:
            return self._hash_content()
        note = self._memo / f"{self._signature()}.jsonl"
        fingerprint = _kept(note)
        if fingerprint is None:
            fingerprint = self._hash_content()
            write_records(note, [fingerprint])
        return fingerprint

    def read(self, index: int) -> Tensor:
        """Read an image, uint8 [3, H, W].

        Raises:
            DataError: it cannot be decoded, is too large, or its file no longer exists.
        """
        return decode(self.load(index))

    def load(self, index: int) -> bytes:
        """Read the bytes of an image's file.

        Raises:
            DataError: it is too large, or no longer exists.
        """
        return _bytes(self._listing.entries[index])

    def _hash_content(self) -> str:
        sha = hashlib.sha256("\n".join(self.classes).encode())
        entries = self._listing.entries
        with (
            self._watch(f"hashing {self.name}", len(entries)) as advance,
            ThreadPoolExecutor(_HASHING_THREADS) as threads,
        ):
            for line in threads.map(_hash_entry, entries):
                sha.update(line)
                advance(1)
        return sha.hexdigest()

    def _hash_files(self) -> str:
        """Hash keys, classes, sizes and times; not the place: a copy that keeps the times is equal."""
        sha = hashlib.sha256("\n".join(self.classes).encode())
        paths = list(dict.fromkeys(entry.path for entry in self._listing.entries))
        times: dict[Path, int] = {}  # in seconds: archives and many file systems store no more
        with (
            self._watch(f"listing {self.name}", len(paths)) as advance,
            ThreadPoolExecutor(_HASHING_THREADS) as threads,
        ):
            for path, status in zip(paths, threads.map(_status, paths), strict=True):
                times[path] = int(status.st_mtime) if status else 0
                advance(1)
        for key, label, path, offset, size in self._listing.entries:
            sha.update(f"{key} {label} {offset} {size} {times[path]}\n".encode())
        return f"files-{sha.hexdigest()}"

    def _signature(self) -> str:
        sha = hashlib.sha256("\n".join(self.classes).encode())
        for path in sorted({entry.path for entry in self._listing.entries}):
            status = _status(path)
            known = f"{status.st_size} {status.st_mtime_ns}" if status else "absent"
            sha.update(f"{path.resolve() if status else path} {known}\n".encode("utf-8", "surrogateescape"))
        for entry in self._listing.entries:
            sha.update(f"{entry.key} {entry.label} {entry.offset} {entry.size}\n".encode())
        return sha.hexdigest()


def spread(items: Sequence[T], limit: int | None) -> tuple[T, ...]:
    """Select at most `limit` items, evenly spaced, so that a sorted folder still yields every class.

    Raises:
        DataError: a limit below 1.
    """
    if limit is None or limit >= len(items):
        return tuple(items)
    if limit < 1:
        raise DataError(f"a limit of {limit} leaves no images; give 1 or more, or leave it out")
    return tuple(items[index * len(items) // limit] for index in range(limit))


def list_folder(root: Path) -> Listing:
    """List the images in one folder per class, at any depth, without hidden files and other extensions.

    A link to a folder inside `root`, or to one that contains it, is not followed, so each image occurs once.

    Raises:
        DataError: no class folders, a class folder without images, or the folder of the splits.
    """
    folders = _class_folders(root)
    entries: list[Entry] = []
    for folder in folders:
        images = _images_under(root, folder)
        if not images:
            raise _no_images(folder)
        entries.extend(images)
    classes = tuple(as_text(folder.name) for folder in folders)
    return Listing(_short_name(root), as_text(root.resolve()), classes, _distinct(entries))


def count_images(root: Path) -> dict[str, int]:
    """Count the images of each class that `list_folder` would list, without a look at any file.

    Raises:
        DataError: as `list_folder`.
    """
    counts = {}
    for folder in _class_folders(root):
        counts[as_text(folder.name)] = sum(_is_image(path.name) for path in _files_under(root, folder))
        if not counts[as_text(folder.name)]:
            raise _no_images(folder)
    return counts


def _class_folders(root: Path) -> list[Path]:
    """Return the folders of the classes, sorted by name; raise DataError where `root` has another layout."""
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    names = [folder.name for folder in folders]
    if not folders:
        loose = any(_is_image(child.name) for child in root.iterdir())
        what = "images but no class folders" if loose else "neither class folders nor tar shards"
        raise DataError(f"{shown(root)}: holds {what}; wanted one folder of images for each class")
    if set(names) <= _SPLIT_NAMES:
        raise DataError(
            f"{root}: holds the splits {', '.join(names)}; name one of them, as in {root / names[0]}"
        )
    for folder in folders:
        if _leads_back(folder, root.resolve()):
            raise DataError(
                f"{shown(folder)}: is a link to {shown(folder.resolve())}, whose images are there already; "
                f"remove it"
            )
    return folders


def _no_images(folder: Path) -> DataError:
    return DataError(f"{shown(folder)}: a class folder without images; remove it or fill it")


def list_shards(pattern: str) -> Listing:
    """List the samples of WebDataset tar files that have an image and a `.cls`.

    Raises:
        DataError: an absent or damaged shard, an image without `.cls`, a duplicate name, or no image.
    """
    entries, notes = _all_entries(pattern)
    if not entries:
        why = "; ".join(notes) or "wanted samples such as 000.jpg with 000.cls"
        raise DataError(f"{shown(pattern)}: no images; {why}")
    words = {entry.label for entry in entries}
    numbers = {word: str(int(word)) for word in words if word.isdecimal()}  # 0 and 00 are one class
    if numbers and len(numbers) < len(words):
        number, word = min(numbers), min(words - numbers.keys())
        raise DataError(
            f"{shown(pattern)}: classes are numbers ({number}) in some .cls and words ({shown(word[:80])}) "
            f"in others; write all of them in one way"
        )
    if numbers:
        entries = tuple(entry._replace(label=numbers[entry.label]) for entry in entries)
    classes = sorted({entry.label for entry in entries}, key=int if numbers else None)
    location = as_text(Path(pattern).absolute())
    return Listing(_short_name(Path(pattern)), location, tuple(classes), entries, notes)


def list_unlabelled(text: str) -> Listing:
    """List every image of a folder, at any depth, or of WebDataset tar files, without classes.

    Raises:
        DataError: no such folder or shards, no images, or a damaged shard.
    """
    path = Path(text)
    notes: tuple[str, ...] = ()
    if path.is_dir():
        entries = _distinct([entry._replace(label="") for entry in _images_under(path, path)])
    elif path.suffix == ".tar" or "{" in text:
        entries, notes = _all_entries(text, labelled=False)
    else:
        raise DataError(f"{shown(text)}: no such folder or shards")
    if not entries:
        raise DataError("; ".join([f"{shown(text)}: holds no images", *notes]))
    return Listing(_short_name(path), as_text(path.absolute()), ("",), entries, notes)


def _kept(note: Path) -> str | None:
    """Read the fingerprint in a memo; None when it is absent or damaged, so that it is recomputed."""
    if not note.exists():
        return None
    try:
        (fingerprint,) = read_records(note, _FINGERPRINT)
    except (DamagedError, ValueError) as error:
        _LOG.warning("damaged, made again: %s", error)
        return None
    return fingerprint


def _expand(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        paths = sorted(Path(pattern).glob("*.tar"))
    else:
        paths = [Path(name) for name in expand_braces(pattern)]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"{shown(absent[0])}: no such shard ({len(absent)} of {len(paths)} are absent)")
    first: dict[str, Path] = {}
    for path in paths:
        if path.stem in first:
            raise DataError(
                f"{shown(first[path.stem])} and {shown(path)}: two shards of one name, which their samples' "
                f"keys begin with; rename one, or leave one out"
            )
        first[path.stem] = path
    return paths


def _all_entries(pattern: str, labelled: bool = True) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Return the entries of tar files, by shard and key, and notes on the members that are no samples."""
    entries: list[Entry] = []
    left_out: list[str] = []
    for path in _expand(pattern):
        samples, others = index_shard(path, labelled=labelled)
        left_out += others
        shard = as_text(path.stem)
        entries += [
            Entry(f"{shard}/{as_text(sample.key)}", sample.label, path, sample.offset, sample.size)
            for sample in samples
        ]
    notes = (f"{_short_name(Path(pattern))}: {dots_note(len(left_out), left_out[0])}",) if left_out else ()
    return tuple(entries), notes


def _images_under(root: Path, folder: Path) -> list[Entry]:
    label, entries = as_text(folder.name), []
    for path in _files_under(root, folder):
        if _is_image(path.name):
            status = _status(path)
            size = status.st_size if status and stat.S_ISREG(status.st_mode) else UNREADABLE
            entries.append(Entry(as_text(path.relative_to(root).as_posix()), label, path, 0, size))
    return entries


def _files_under(root: Path, folder: Path) -> Iterator[Path]:
    """Yield every file, sorted, before those of subfolders; no folder twice, and no hidden folder."""
    real, seen, left = root.resolve(), set(), [folder]
    while left:
        parent = left.pop()
        status = parent.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(parent) as scan:
            children = sorted((child.name, _is_folder(child)) for child in scan)
        yield from (parent / name for name, is_folder in children if not is_folder)
        folders = [parent / name for name, is_folder in children if is_folder and not name.startswith(".")]
        left += [child for child in reversed(folders) if not _leads_back(child, real)]


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a circular link
        return False


def _leads_back(folder: Path, root: Path) -> bool:
    """Check whether a folder is a link to one inside `root` or containing it, which is listed anyway."""
    if not folder.is_symlink():
        return False
    real = folder.resolve()
    return real.is_relative_to(root) or root.is_relative_to(real)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_ENDINGS)


def _distinct(entries: list[Entry]) -> tuple[Entry, ...]:
    keys = {entry.key for entry in entries}
    if len(keys) < len(entries):
        for entry in entries:
            if entry.key not in keys:
                raise DataError(f"{shown(entry.path)}: two images have the key {entry.key}; rename one")
            keys.remove(entry.key)
    return tuple(entries)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # a broken or circular link
        return None


def _bytes(entry: Entry) -> bytes:
    if entry.size == UNREADABLE:
        raise DataError("is a link that leads nowhere, or no regular file")
    if entry.size > MAX_IMAGE_BYTES:
        raise DataError(f"has {entry.size:,} bytes, the limit is {MAX_IMAGE_BYTES:,}")
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
    except OSError as error:
        raise DataError(f"cannot be read ({error})") from error
    if entry.offset and len(data) < entry.size:
        raise DataError(f"its shard has become shorter: {len(data):,} of {entry.size:,} bytes")
    return data


def _hash_entry(entry: Entry) -> bytes:
    if entry.size == UNREADABLE or entry.size > MAX_IMAGE_BYTES:
        digest = f"{entry.size} bytes"  # it is omitted
    else:
        digest = hashlib.sha256(_bytes(entry)).hexdigest()
    return f"{entry.key} {entry.label} {digest}\n".encode()


def as_text(name: object) -> str:
    r"""Convert a path to valid UTF-8; invalid bytes become `\xNN`."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _short_name(path: Path) -> str:
    parts = path.absolute().parts
    return as_text("/".join(parts[-2:]) if path.name.lower() in _SPLIT_NAMES else path.name)

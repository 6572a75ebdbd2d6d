"""Pictures in files: an image folder or WebDataset tar shards, listed without reading the pictures."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple, final

import braceexpand
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radio.errors import DataError
from radio.images import IMAGE_ENDINGS, decode
from radio.io import write_text

PICTURE_ENDINGS = IMAGE_ENDINGS
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_HASHING_THREADS = 4  # hashlib lets go of the interpreter; more threads only fight over the disk


class Entry(NamedTuple):
    """Where one picture's bytes are."""

    key: str
    label: str  # the class's name
    path: Path
    offset: int
    size: int


class Listing(NamedTuple):
    """The pictures of a data set, in order."""

    name: str
    location: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]


@final
class StoredImages:
    """A listing whose pictures can be read."""

    def __init__(self, listing: Listing, memo: Path | None = None) -> None:
        self._listing, self._memo = listing, memo
        places = {name: place for place, name in enumerate(listing.classes)}
        self._labels = np.array([places[entry.label] for entry in listing.entries], dtype=np.int64)
        self._keys = tuple(entry.key for entry in listing.entries)
        self._fingerprint: str | None = None

    @property
    def name(self) -> str:
        """The folder's or the pattern's last parts."""
        return self._listing.name

    @property
    def location(self) -> str:
        """The resolved path or pattern."""
        return self._listing.location

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted (numbers by value)."""
        return self._listing.classes

    @property
    def keys(self) -> tuple[str, ...]:
        """Paths inside the folder, or shard and sample name."""
        return self._keys

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], the class of each picture."""
        return self._labels

    @property
    def fingerprint(self) -> str:
        """sha256 of classes and of every picture's key, class and bytes.

        Reads every picture once; with a memo folder the answer is kept until a file's size or time changes.
        """
        if self._fingerprint is None:
            note = self._memo / f"{self._signature()}.json" if self._memo else None
            if note is not None and note.is_file():
                self._fingerprint = str(json.loads(note.read_text(encoding="utf-8")))
            else:
                self._fingerprint = self._hash_content()
                if note is not None:
                    write_text(note, json.dumps(self._fingerprint))
        return self._fingerprint

    def read(self, index: int) -> Tensor:
        """The picture, uint8 [3, H, W].

        Raises:
            DataError: it cannot be decoded, or its file has gone.
        """
        return decode(_bytes(self._listing.entries[index]))

    def _hash_content(self) -> str:
        sha = hashlib.sha256("\n".join(self.classes).encode())
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            for line in threads.map(_hash_entry, self._listing.entries, chunksize=64):
                sha.update(line)
        return sha.hexdigest()

    def _signature(self) -> str:
        sha = hashlib.sha256("\n".join(self.classes).encode())
        for path in sorted({entry.path for entry in self._listing.entries}):
            stat = path.stat()
            sha.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for entry in self._listing.entries:
            sha.update(f"{entry.key} {entry.label} {entry.offset} {entry.size}\n".encode())
        return sha.hexdigest()


def spread(entries: tuple[Entry, ...], limit: int | None) -> tuple[Entry, ...]:
    """At most `limit` entries, evenly spaced, so that a sorted folder still gives every class."""
    if limit is None or limit >= len(entries):
        return entries
    return tuple(entries[place * len(entries) // limit] for place in range(limit))


def list_folder(root: Path) -> Listing:
    """The pictures under one folder a class; deeper folders count, hidden files and other endings do not.

    Raises:
        DataError: no class folders, a class folder without pictures, or the folder of the splits.
    """
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    names = [folder.name for folder in folders]
    if not folders:
        loose = any(_is_picture(child.name) for child in root.iterdir())
        what = "pictures but no class folders" if loose else "neither class folders nor tar shards"
        raise DataError(f"{root}: holds {what}; wanted one folder of pictures for each class")
    if set(names) <= _SPLIT_NAMES:
        raise DataError(
            f"{root}: holds the splits {', '.join(names)}; name one of them, as in {root / names[0]}"
        )
    entries: list[Entry] = []
    for folder in folders:
        found = _pictures_under(root, folder)
        if not found:
            raise DataError(f"{folder}: a class folder without pictures; remove it or fill it")
        entries.extend(found)
    return Listing(_short_name(root), str(root.resolve()), tuple(names), tuple(entries))


def list_shards(pattern: str) -> Listing:
    """The samples of WebDataset tar files that have a picture and a `.cls`.

    Raises:
        DataError: a shard that is absent or damaged, a picture without `.cls`, or no pictures at all.
    """
    paths = _expand(pattern)
    entries = tuple(entry for path in paths for entry in _index_shard(path))
    if not entries:
        raise DataError(f"{pattern}: no pictures; wanted samples such as 000.jpg with 000.cls")
    names = {entry.label for entry in entries}
    classes = sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)
    location = str(Path(pattern).absolute())
    return Listing(_short_name(Path(pattern)), location, tuple(classes), entries)


def list_unlabelled(text: str) -> Listing:
    """Every picture of a folder, however deep, or of WebDataset tar files, without classes.

    Raises:
        DataError: nothing of the kind is there, or a shard is damaged.
    """
    path = Path(text)
    if path.is_dir():
        entries = [entry._replace(label="") for entry in _pictures_under(path, path)]
    elif path.suffix == ".tar" or "{" in text:
        entries = [entry for shard in _expand(text) for entry in _index_shard(shard, labelled=False)]
    else:
        raise DataError(f"{text}: no such folder or shards")
    if not entries:
        raise DataError(f"{text}: holds no pictures")
    return Listing(_short_name(path), str(path.absolute()), ("",), tuple(entries))


def _expand(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        return sorted(Path(pattern).glob("*.tar"))
    try:
        paths = [Path(name) for name in braceexpand.braceexpand(pattern)]
    except ValueError as error:  # unbalanced braces
        raise DataError(
            f"{pattern}: {error}; wanted a pattern such as photos-{{000000..000003}}.tar"
        ) from error
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"{absent[0]}: no such shard ({len(absent)} of {len(paths)} are absent)")
    return paths


def _index_shard(path: Path, labelled: bool = True) -> list[Entry]:
    """The entries of one tar file; only headers and `.cls` members are read."""
    pictures: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                stem, ending = _split_name(member.name)
                if ending in PICTURE_ENDINGS:
                    pictures.setdefault(stem, (member.offset_data, member.size))
                elif ending == ".cls":
                    file = tar.extractfile(member)
                    labels[stem] = file.read().decode("utf-8").strip() if file else ""
    except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path}: not a plain tar file, or a damaged one ({error})") from error
    unlabelled = [stem for stem in pictures if not labels.get(stem)]
    if unlabelled and labelled:
        raise DataError(
            f"{path}: {unlabelled[0]} has no .cls ({len(unlabelled)} of {len(pictures)} pictures lack it); "
            f"wanted a class for each"
        )
    return [
        Entry(f"{path.stem}/{stem}", labels[stem] if labelled else "", path, *place)
        for stem, place in sorted(pictures.items())
    ]


def _split_name(name: str) -> tuple[str, str]:
    """Sample name and ending, as WebDataset cuts them: at the first dot of the file's name."""
    path = PurePosixPath(name)
    stem, dot, ending = path.name.partition(".")
    return str(path.parent / stem), f"{dot}{ending}".lower()


def _pictures_under(root: Path, folder: Path) -> list[Entry]:
    entries = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if _is_picture(name):
                path = Path(parent, name)
                key = path.relative_to(root).as_posix()
                entries.append(Entry(key, folder.name, path, 0, path.stat().st_size))
    return entries


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(PICTURE_ENDINGS)


def _bytes(entry: Entry) -> bytes:
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size)
    except OSError as error:
        raise DataError(f"cannot be read ({error})") from error


def _hash_entry(entry: Entry) -> bytes:
    digest = hashlib.sha256(_bytes(entry)).hexdigest()
    return f"{entry.key} {entry.label} {digest}\n".encode()


def _short_name(path: Path) -> str:
    parts = path.absolute().parts
    return "/".join(parts[-2:]) if path.name.lower() in _SPLIT_NAMES else path.name

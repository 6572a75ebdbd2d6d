"""Index of a WebDataset tar file from its headers: the offset and class of each image."""

from __future__ import annotations

import io
import posixpath
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, final

from .errors import DataError, shown
from .images import IMAGE_ENDINGS
from .io import decode_text

UNREADABLE = -1
"""The size of an image whose bytes do not exist."""

_MAX_HEADER = 1 << 20  # bytes: extended headers hold a name, and sometimes a few attributes
_MAX_LABEL = 4096  # bytes of a class's name
_BLOCK = 512
# Errors that tarfile raises on damaged headers.
_ERRORS = (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError, OSError, RecursionError)


class Sample(NamedTuple):
    """An image in a shard."""

    key: str
    label: str
    offset: int
    size: int


class Shard(NamedTuple):
    """Content of a tar file."""

    samples: list[Sample]  # by key
    left_out: list[str]  # members with an image extension that belong to no sample, by name


class _Place(NamedTuple):
    offset: int
    size: int


def index_shard(path: Path, *, labelled: bool = True) -> Shard:
    """Index the images of a plain tar file, reading only headers and `.cls` members.

    A key ends at the first dot of a member's name, as in WebDataset: `img.v1.jpg` is part `v1.jpg` of the
    sample `img`. Beside `img.jpg` that is a mask or a smaller copy; otherwise it is a lost image, which is
    reported in `left_out`.

    Args:
        labelled: whether each image has a class in the member KEY.cls.

    Raises:
        DataError: no tar file, a damaged one, two images with one key, or an image without a class.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{shown(path)}: is no regular file; wanted a tar file")
        with _Bounded(io.FileIO(path)) as file:
            places = _list_members(path, file, status.st_size)
            images, left_out = _find_images(path, places)
            labels = _read_labels(path, file, places) if labelled else {}
    except DataError:
        raise
    except _ERRORS as error:
        raise DataError(f"{shown(path)}: not a plain tar file, or a damaged one ({shown(error)})") from error
    if labelled:
        _check_labels(path, images, labels)
    samples = [Sample(key, labels.get(key, ""), *places[name]) for key, name in sorted(images.items())]
    return Shard(samples, left_out)


def dots_note(count: int, first: str) -> str:
    """Describe members that are no samples, since a key ends at the first dot; `first` names one."""
    folder, slash, file = first.rpartition("/")
    stem, dot, ending = file.rpartition(".")
    return (
        f"{count} members end in an image's ending and are not samples, the first is {shown(first)} (its "
        f"ending begins at the first dot: {shown(_cut_first(first)[1])}); rename them, as in "
        f"{shown(folder)}{slash}{shown(stem).replace('.', '_')}{dot}{ending}"
    )


@final
class _Bounded(io.BufferedReader):
    """A file that rejects reads above 1 MiB, which a damaged header may request."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _list_members(path: Path, file: BinaryIO, length: int) -> dict[str, _Place]:
    """Return the offset and size of every image and every `.cls`, by name."""
    places: dict[str, _Place] = {}
    links: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            _check_member(path, member, tar, length)
            if not _is_wanted(member.name):
                continue
            name = str(PurePosixPath(member.name))
            if name in places or name in links:
                raise DataError(f"{shown(path)}: holds {shown(name)} twice; pack it anew")
            if member.issym():
                links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
            elif member.islnk():
                links[name] = member.linkname
            elif member.isfile():
                places[name] = _Place(member.offset_data, member.size)
        end = tar.offset
    file.seek(end)
    rest = file.read(_MAX_HEADER)
    if rest[:_BLOCK].count(0) != _BLOCK:  # tarfile treats a damaged header as the end
        raise tarfile.ReadError(f"a damaged header at byte {end}, or no end mark")
    if any(rest):
        raise tarfile.ReadError(f"more behind its end mark at byte {end}; are these two tar files in one?")
    for name, target in links.items():
        places[name] = _follow(target, places, links)
    return places


def _check_member(path: Path, member: tarfile.TarInfo, tar: tarfile.TarFile, length: int) -> None:
    if _is_wanted(member.name) and member.issparse():
        raise DataError(f"{shown(path)}: {shown(member.name)} is stored sparse; pack it without --sparse")
    bodiless = member.type in tarfile.SUPPORTED_TYPES and not member.isreg()
    stored = 0 if bodiless or member.issparse() else member.size
    if not 0 <= stored <= length - member.offset_data or tar.offset <= member.offset:
        raise DataError(
            f"{shown(path)}: {shown(member.name)} would have {member.size:,} bytes from byte "
            f"{member.offset_data:,} on, and the file has {length:,}; it is truncated or damaged"
        )


def _follow(target: str, places: dict[str, _Place], links: dict[str, str]) -> _Place:
    for _ in range(len(links) + 1):
        target = posixpath.normpath(target)
        if target in places:
            return places[target]
        if target not in links:
            break
        target = links[target]
    return _Place(0, UNREADABLE)


def _find_images(path: Path, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the image member of each key, and the members whose key has no image."""
    images: dict[str, str] = {}
    others = []
    for name in sorted(name for name in names if name.lower().endswith(IMAGE_ENDINGS)):
        key, ending = _cut_first(name)
        if ending not in IMAGE_ENDINGS:
            others.append(name)
        elif images.setdefault(key, name) != name:
            raise DataError(
                f"{shown(path)}: {shown(images[key])} and {shown(name)} are two images of one key; "
                f"give each a name of its own before the dot"
            )
    return images, [name for name in others if _cut_first(name)[0] not in images]


def _read_labels(path: Path, file: BinaryIO, places: dict[str, _Place]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, place in places.items():
        key, ending = _cut_first(name)
        if ending != ".cls" or place.size == UNREADABLE:
            continue
        where = f"{path}: {name}"
        if place.size > _MAX_LABEL:
            raise DataError(f"{shown(where)}: has {place.size:,} bytes; wanted the name of a class")
        file.seek(place.offset)
        label = decode_text(file.read(place.size), where).strip()
        if len(label.splitlines()) > 1:
            raise DataError(f"{shown(where)}: holds several lines; wanted the name of a class")
        if labels.setdefault(key, label) != label:
            raise DataError(f"{shown(where)}: a second class for {shown(key)}; wanted one")
    return labels


def _check_labels(path: Path, images: dict[str, str], labels: dict[str, str]) -> None:
    lacking = [key for key in sorted(images) if not labels.get(key)]
    if not lacking:
        return
    raise DataError(
        f"{shown(path)}: {shown(lacking[0])} has no .cls ({len(lacking)} of {len(images)} images lack "
        f"it); wanted a class for each"
    )


def _is_wanted(name: str) -> bool:
    return not posixpath.basename(name).startswith(".") and name.lower().endswith((*IMAGE_ENDINGS, ".cls"))


def _cut_first(name: str) -> tuple[str, str]:
    """Split a name into key and extension at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{ending}".lower()

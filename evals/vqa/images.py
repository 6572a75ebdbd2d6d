"""Images by name, from a folder or a tar file, as an image source for the encoder."""

from __future__ import annotations

import os
import tarfile
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio.data import ImageSource
from radio.errors import DataError, shown
from radio.image_files import Entry, Listing, StoredImages

# Letters: N images, H W pixels.

PADDING = (0.48145466, 0.4578275, 0.40821073)
"""The mean colour of CLIP's training images, which LLaVA pads with."""


@final
class Images:
    """The files of a folder or the members of one tar file, by name.

    Raises:
        DataError: no such folder or file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path}: no such folder or tar file of images")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def source(self, names: Iterable[str], memo: Path | None = None, title: str | None = None) -> ImageSource:
        """Return a source of the named images, each once, sorted by name.

        Raises:
            DataError: an image is absent.
        """
        entries = []
        for name in sorted(set(names)):
            place = self._find(name)
            if place is None:
                raise DataError(f"{self.path}: there is no image {name!r}")
            entries.append(Entry(name, "", *place))
        listing = Listing(title or self.path.name, str(self.path.resolve()), ("",), tuple(entries))
        return StoredImages(listing, memo)

    def _find(self, name: str) -> tuple[Path, int, int] | None:
        """Find an image; return file, offset and size of its bytes, or None without one of that name.

        Accents may be in another Unicode form (NFC, NFD) than in the folder or tar file.
        """
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts:
            return None
        for form in (None, "NFC", "NFD"):
            found = self._place(unicodedata.normalize(form, str(plain)) if form else str(plain))
            if found is not None:
                return found
        return None

    def _place(self, name: str) -> tuple[Path, int, int] | None:
        if self.path.is_file():
            return self._members.get(name)
        path = self.path / name
        if not os.path.isfile(path):  # noqa: PTH113 (unlike Path's, it never raises)
            return None
        return path, 0, path.stat().st_size

    @cached_property
    def _members(self) -> dict[str, tuple[Path, int, int]]:
        found: dict[str, tuple[Path, int, int]] = {}
        length = self.path.stat().st_size
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    name = str(PurePosixPath(member.name))
                    if not 0 <= member.size <= length - member.offset_data:
                        raise DataError(
                            f"{self.path}: {shown(name)} is said to have {member.size} bytes, and "
                            f"{length - member.offset_data} are left of the file; it is damaged or cut off"
                        )
                    if not member.isfile():
                        continue
                    if name in found:
                        raise DataError(f"{self.path}: holds {shown(name)} twice; keep one of them")
                    found[name] = (self.path, member.offset_data, member.size)
        except DataError:
            raise
        except (tarfile.TarError, OSError, EOFError, MemoryError, ValueError) as error:
            raise DataError(f"{self.path}: not a tar file without compression ({error})") from error
        return found


@final
class Padded:
    """A source whose images are centred and padded with the mean colour to the aspect ratio of `size`."""

    def __init__(self, source: ImageSource, size: tuple[int, int]) -> None:
        self._source, self._size = source, size
        self.name, self.location = source.name, source.location

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the source."""
        return self._source.classes

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the source."""
        return self._source.keys

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the source."""
        return self._source.labels

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the source."""
        return self._source.notes

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source and of the aspect ratio."""
        return f"{self._source.fingerprint} padded to {self._size[0]}:{self._size[1]}"

    def read(self, index: int) -> Tensor:
        """Read an image and pad it: uint8 [3, H, W]."""
        return pad(self._source.read(index), self._size)


def pad(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad an image uint8 [3, H, W] on both sides to the smallest one of the aspect ratio of `size`."""
    height, width = image.shape[-2:]
    tall = max(height, -(-width * size[0] // size[1]))
    wide = max(width, -(-height * size[1] // size[0]))
    if (tall, wide) == (height, width):
        return image
    colour = torch.tensor([int(255 * part) for part in PADDING], dtype=torch.uint8)
    padded = colour.view(3, 1, 1).expand(3, tall, wide).clone()
    top, left = (tall - height) // 2, (wide - width) // 2
    padded[:, top : top + height, left : left + width] = image
    return padded

"""Images with captions: COCO's captions JSON and a folder, or the generated world."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from radio.data import ImageSource, SceneImages
from radio.errors import DataError, shown
from radio.image_files import Entry, Listing, StoredImages
from radio.io import MAX_DATA_BYTES, parse_json, read_text, validate
from radio.scenes import captions as scene_captions
from radio.scenes import render

# Letters: N images, M captions.

_Id = int | str


class _CaptionedImage(TypedDict):
    """An image of a captions file; further fields are ignored."""

    id: _Id
    file_name: Annotated[str, Field(min_length=1)]


class _Caption(TypedDict):
    """A caption."""

    image_id: _Id
    caption: str


class _CaptionsFile(TypedDict):
    """The fields of a captions file that are read."""

    images: list[_CaptionedImage]
    annotations: list[_Caption]


_FILE = TypeAdapter(_CaptionsFile)


class Captioned(NamedTuple):
    """Images and their captions."""

    source: ImageSource
    texts: tuple[str, ...]
    owners: Tensor  # [M] int64, the image of each caption, ascending


def open_captions(
    file: str, images: Path | None, *, limit: int | None, scenes: int, seed: int, memo: Path | None
) -> Captioned:
    """Open the captioned images of a COCO captions JSON, or of the generated world (`scenes`).

    Images without captions are omitted.

    Raises:
        DataError: an absent or invalid file, or images that are not in the folder.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no images; give 1 or more, or leave it out")
    if file == "scenes":
        count = min(scenes, limit or scenes)
        source = SceneImages("val", count=count, seed=seed)
        scenes_said = [scene_captions(render(index, split="val", seed=seed)) for index in range(count)]
        return _joined(source, scenes_said)
    assert images is not None, "the settings ask for both"
    names, texts_of = _read(Path(file))
    if limit is not None and limit < len(names):
        chosen = [place * len(names) // limit for place in range(limit)]
        names, texts_of = [names[i] for i in chosen], [texts_of[i] for i in chosen]
    return _joined(StoredImages(_listing(Path(file), images, names), memo), texts_of)


def _joined(source: ImageSource, texts_of: Sequence[Sequence[str]]) -> Captioned:
    owners = torch.tensor([place for place, texts in enumerate(texts_of) for _ in texts])
    return Captioned(source, tuple(text for texts in texts_of for text in texts), owners)


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the file names, and the captions of each, in the order of the file."""
    if not path.exists():
        raise DataError(f"{shown(path)}: no such captions file")
    data = validate(
        _FILE,
        parse_json(read_text(path, limit=MAX_DATA_BYTES), path),
        f"{shown(path)}: not COCO captions (images with id and file_name, annotations with image_id and "
        f"caption)",
    )
    names = _names(data["images"], path)
    texts_of: dict[int | str, list[str]] = {number: [] for number in names}
    for place, annotation in enumerate(data["annotations"]):
        text, number = annotation["caption"].strip(), annotation["image_id"]
        if number not in texts_of:
            raise DataError(
                f"{shown(path)}: not COCO captions: annotation {place} is of the image {number!r}, which the "
                f"file does not list"
            )
        if not text:
            raise DataError(f"{shown(path)}: annotation {place} has an empty caption; take it out")
        texts_of[number].append(text)
    kept = [number for number in names if texts_of[number]]
    if not kept:
        raise DataError(f"{shown(path)}: no image in it has a caption")
    return [names[number] for number in kept], [texts_of[number] for number in kept]


def _names(images: list[_CaptionedImage], path: Path) -> dict[int | str, str]:
    """Map the id of each image to its file name; both have to be unique."""
    names: dict[int | str, str] = {}
    files: set[str] = set()
    for place, image in enumerate(images):
        name = image["file_name"]
        if image["id"] in names or name in files:
            what = f"id {image['id']!r}" if image["id"] in names else f"file {shown(name)}"
            raise DataError(f"{shown(path)}: image {place} has the {what} of another; each needs its own")
        names[image["id"]] = name
        files.add(name)
    return names


def _listing(file: Path, images: Path, names: list[str]) -> Listing:
    paths = [_find(images, name) for name in names]
    absent = [name for name, path in zip(names, paths, strict=True) if path is None]
    if absent:
        raise DataError(
            f"{images}: {len(absent)} of the {len(names)} images of {file.name} are not there, "
            f"the first is {shown(absent[0][:200])}"
        )
    present = [(name, path) for name, path in zip(names, paths, strict=True) if path is not None]
    entries = [Entry(name, "", path, 0, path.stat().st_size) for name, path in present]
    return Listing(file.stem, str(images.resolve()), ("",), tuple(entries))


def _find(images: Path, name: str) -> Path | None:
    """Find the image with that name, in any Unicode form of its accents; None if it does not exist."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        try:
            if (images / form).is_file():
                return images / form
        except (OSError, ValueError):  # an invalid file name
            continue
    return None

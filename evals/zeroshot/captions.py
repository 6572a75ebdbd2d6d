"""Pictures with captions: COCO's captions JSON and a folder, or the generated world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evals.core.data import ImageSource, SceneImages
from evals.core.stored import Entry, Listing, StoredImages
from radio.errors import DataError
from radio.scenes import captions as scene_captions
from radio.scenes import render

# Letters: N pictures, M captions.


class Captioned(NamedTuple):
    """Pictures and what is said of them."""

    source: ImageSource
    texts: tuple[str, ...]
    owners: Tensor  # [M] int64, the picture of each caption, ascending


def open_captions(
    file: str, images: Path | None, *, limit: int | None, scenes: int, seed: int, memo: Path | None
) -> Captioned:
    """The captioned pictures of a COCO captions JSON, or of the generated world (`scenes`).

    Pictures without captions are left out.

    Raises:
        DataError: no such file, not such a file, or pictures that are not in the folder.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no pictures; give 1 or more, or leave it out")
    if file == "scenes":
        count = min(scenes, limit or scenes)
        source = SceneImages("val", count=count, seed=seed)
        scenes_said = [scene_captions(render(index, split="val", seed=seed)) for index in range(count)]
        return _joined(source, scenes_said)
    assert images is not None, "the settings ask for both"
    names, said = _read(Path(file))
    if limit is not None and limit < len(names):
        chosen = [place * len(names) // limit for place in range(limit)]
        names, said = [names[i] for i in chosen], [said[i] for i in chosen]
    return _joined(StoredImages(_listing(Path(file), images, names), memo), said)


def _joined(source: ImageSource, said: Sequence[Sequence[str]]) -> Captioned:
    owners = torch.tensor([place for place, texts in enumerate(said) for _ in texts])
    return Captioned(source, tuple(text for texts in said for text in texts), owners)


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """File names, and the captions of each, in the order of the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such captions file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        said: dict[Any, list[str]] = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            said[annotation["image_id"]].append(str(annotation["caption"]).strip())
        names = {image["id"]: str(image["file_name"]) for image in data["images"]}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not COCO captions ({type(error).__name__}: {error}); wanted images with id and "
            f"file_name, and annotations with image_id and caption"
        ) from error
    kept = [number for number in names if said[number]]
    if not kept:
        raise DataError(f"{path}: no picture in it has a caption")
    return [names[number] for number in kept], [said[number] for number in kept]


def _listing(file: Path, images: Path, names: list[str]) -> Listing:
    absent = [name for name in names if not (images / name).is_file()]
    if absent:
        raise DataError(
            f"{images}: {len(absent)} of the {len(names)} pictures of {file.name} are not there, "
            f"the first is {absent[0]}"
        )
    entries = [Entry(name, "", images / name, 0, (images / name).stat().st_size) for name in names]
    return Listing(file.stem, str(images.resolve()), ("",), tuple(entries))

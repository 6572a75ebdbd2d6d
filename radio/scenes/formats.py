"""The five layouts: the files of a scene's image and of its labels."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio.io import write_text
from radio.registry import Registry

from .language import caption, captions, questions
from .rle import compress, run_lengths
from .world import CLASSES, COLOURS, SHAPES, Scene, Split, render, semantic

_JPEG_QUALITY = 95
_ADE_FOLDERS: dict[Split, str] = {"train": "training", "val": "validation"}
_SHORT_ANSWER = "Answer the question using a single word or phrase."


class Job(NamedTuple):
    """A range of scenes of one split that one process writes below `root`."""

    layout: str
    root: Path
    split: Split
    number: int  # index of this job among those of its split
    start: int
    stop: int
    seed: int
    size: int

    def scenes(self) -> Iterator[tuple[int, Scene]]:
        """Yield each index with its scene."""
        for index in range(self.start, self.stop):
            yield index, render(index, split=self.split, seed=self.seed, size=self.size)


class Layout(Protocol):
    """The files of one data set. Jobs run in any order and process; the rest runs in the parent process."""

    def prepare(self, job: Job) -> None:
        """Make the folders into which the job writes."""

    def write(self, job: Job) -> list[Any]:
        """Write the job's images; return records for the files of the whole split."""

    def finish(self, root: Path, split: Split, records: list[Any]) -> None:
        """Write the files of a whole split; `records` are in the order of the scenes."""


LAYOUTS: Registry[Layout] = Registry("layout")


def _image(scene: Scene) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(scene.image.transpose(1, 2, 0)))


def _save_jpeg(scene: Scene, target: Path | io.BytesIO) -> None:
    _image(scene).save(target, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)


def _write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data) + "\n")


class ImageFolder:
    """`train/red_circle/000000.png`: one folder per class; PNG, to preserve the exact pixels."""

    def prepare(self, job: Job) -> None:
        for name in CLASSES:
            (job.root / job.split / _folder(name)).mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> list[Any]:
        for index, scene in job.scenes():
            path = job.root / job.split / _folder(CLASSES[scene.label]) / f"{index:06d}.png"
            _image(scene).save(path, compress_level=1)
        return []

    def finish(self, root: Path, split: Split, records: list[Any]) -> None:
        """Remove the folders of classes absent from a small split: readers refuse empty folders."""
        for folder in sorted((root / split).iterdir()):
            if not any(folder.iterdir()):
                folder.rmdir()


def _folder(name: str) -> str:
    return name.replace(" ", "_")


class WebDataset:
    """`train-000000.tar`, 500 scenes each.

    Members: .jpg, .cls (class index), .txt (a caption) and .json (class and objects).
    """

    def prepare(self, job: Job) -> None:
        job.root.mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> list[Any]:
        path = job.root / f"{job.split}-{job.number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, scene in job.scenes():
                image = io.BytesIO()
                _save_jpeg(scene, image)
                said = caption(scene, index, split=job.split, seed=job.seed)
                _add(tar, f"{job.split}{index:08d}.jpg", image.getvalue())
                _add(tar, f"{job.split}{index:08d}.cls", str(scene.label).encode())
                _add(tar, f"{job.split}{index:08d}.txt", said.encode())
                _add(tar, f"{job.split}{index:08d}.json", json.dumps(_facts(scene)).encode())
        return []

    def finish(self, root: Path, split: Split, records: list[Any]) -> None:
        """Do nothing: each shard is complete."""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member without owner and with time 0, so that the bytes depend only on the content."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _facts(scene: Scene) -> dict[str, Any]:
    objects = [
        {"shape": SHAPES[o.shape], "colour": COLOURS[o.colour], "box": o.box, "area": o.area, "main": o.main}
        for o in scene.objects
    ]
    return {"label": scene.label, "class": CLASSES[scene.label], "objects": objects}


class Ade20k:
    """`images/training/ADE_train_00000001.jpg` and `annotations/training/ADE_train_00000001.png`.

    As in ADE20K, an annotation's 0 is void, which no pixel has here, and label i is line i of `classes.txt`:
    the background, then the ten shapes. The background and so the objects' borders therefore count.
    """

    def prepare(self, job: Job) -> None:
        for kind in ("images", "annotations"):
            (job.root / kind / _ADE_FOLDERS[job.split]).mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> list[Any]:
        folder = _ADE_FOLDERS[job.split]
        for index, scene in job.scenes():
            name = f"ADE_{job.split}_{index + 1:08d}"
            _save_jpeg(scene, job.root / "images" / folder / f"{name}.jpg")
            Image.fromarray(semantic(scene) + 1).save(job.root / "annotations" / folder / f"{name}.png")
        return []

    def finish(self, root: Path, split: Split, records: list[Any]) -> None:
        write_text(root / "classes.txt", "".join(f"{name}\n" for name in ("background", *SHAPES)))


class Coco:
    """`train/000000000001.jpg`, `annotations/instances_train.json` and its captions; likewise `val`.

    Categories are the ten shapes (1 to 10); segmentations are compressed run lengths, since rings have holes
    and objects occlude each other; each caption template gives one caption.
    """

    def prepare(self, job: Job) -> None:
        (job.root / job.split).mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> list[Any]:
        records = []
        for index, scene in job.scenes():
            name = f"{index + 1:012d}.jpg"
            _save_jpeg(scene, job.root / job.split / name)
            image = {"id": index + 1, "file_name": name, "width": job.size, "height": job.size}
            records.append((image, _instances(scene), captions(scene)))
        return records

    def finish(self, root: Path, split: Split, records: list[Any]) -> None:
        images = [image for image, _, _ in records]
        found = [{"image_id": image["id"], **item} for image, items, _ in records for item in items]
        said = [{"image_id": image["id"], "caption": text} for image, _, texts in records for text in texts]
        categories = [
            {"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, start=1)
        ]
        head = {"info": {"description": f"generated scenes, {split}"}, "licenses": [], "images": images}
        folder = root / "annotations"
        _write_json(
            folder / f"instances_{split}.json",
            {**head, "annotations": _numbered(found), "categories": categories},
        )
        _write_json(folder / f"captions_{split}.json", {**head, "annotations": _numbered(said)})


def _numbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": number, **record} for number, record in enumerate(records, start=1)]


def _instances(scene: Scene) -> list[dict[str, Any]]:
    found = []
    for number, item in enumerate(scene.objects, start=1):
        x0, y0, x1, y1 = item.box
        found.append(
            {
                "category_id": item.shape + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": item.area,
                "iscrowd": 0,
                "segmentation": _segmentation(scene.instances == number),
                "colour": COLOURS[item.colour],
            }
        )
    return found


def _segmentation(mask: NDArray[np.bool_]) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": compress(run_lengths(mask))}


class Llava:
    """`train/00000000.jpg`, and for LLaVA's two stages `pretrain_train.json` and `instruct_train.json`.

    The first holds one caption per image, the second questions with one-word answers; the placeholder
    `<image>` precedes the first question.
    """

    def prepare(self, job: Job) -> None:
        (job.root / job.split).mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> list[Any]:
        records = []
        for index, scene in job.scenes():
            name = f"{job.split}/{index:08d}.jpg"
            _save_jpeg(scene, job.root / name)
            said = caption(scene, index, split=job.split, seed=job.seed)
            asked = questions(scene, index, split=job.split, seed=job.seed)
            head = {"id": f"{job.split}{index:08d}", "image": name}
            turns = [turn for q in asked for turn in _turns(f"{q.text}\n{_SHORT_ANSWER}", q.answer)]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            records.append(
                ({**head, "conversations": _turns("<image>", said)}, {**head, "conversations": turns})
            )
        return records

    def finish(self, root: Path, split: Split, records: list[Any]) -> None:
        _write_json(root / f"pretrain_{split}.json", [pretrain for pretrain, _ in records])
        _write_json(root / f"instruct_{split}.json", [instruct for _, instruct in records])


def _turns(human: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


LAYOUTS.add("image-folder", ImageFolder())
LAYOUTS.add("webdataset", WebDataset())
LAYOUTS.add("ade20k", Ade20k())
LAYOUTS.add("coco", Coco())
LAYOUTS.add("llava", Llava())

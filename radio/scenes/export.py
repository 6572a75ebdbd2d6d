"""Write the world atomically to a folder in the layout of a known data set."""

import hashlib
import io
import json
import multiprocessing
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from radio.errors import DataError, RadioError
from radio.io import make_folder, read_json, read_text, write_text
from radio.registry import Registry

from .drawing import SHAPES
from .language import caption, captions, questions
from .world import CLASSES, COLOURS, MAX_SIZE, MIN_SIZE, Scene, SceneError, Split, render, semantic

METADATA_FILE = "scenes.json"
CARD_VERSION = 2
_CARDS = TypeAdapter(dict[str, Any])
_MOST, _MOST_WORKERS = 10_000_000, 1024
_CHUNK = 500  # scenes per job, for any number of workers; also per WebDataset shard
_JPEG_QUALITY = 95
_ADE_FOLDERS: dict[Split, str] = {"train": "training", "val": "validation"}
_SHORT_ANSWER = "Answer the question using a single word or phrase."


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenesSettings:
    """All settings that determine the bytes of a written world."""

    layout: str
    count: int = 2000
    val_count: int = 200
    seed: int = 0
    size: int = 96


class ExportJob(NamedTuple):
    """A range of scenes of one split that one process writes below `root`."""

    root: Path
    settings: ScenesSettings
    split: Split
    number: int  # index of this job among those of its split
    start: int
    stop: int

    def scenes(self) -> Iterator[tuple[int, Scene]]:
        """Yield each index with its scene."""
        for index in range(self.start, self.stop):
            yield index, render(index, split=self.split, seed=self.settings.seed, size=self.settings.size)


class ExportLayout(NamedTuple):
    """The files of one data set.

    `write` writes the images of a job, in any order and process, and returns records for the files of the
    whole split; `finish` writes these in the parent process, the records in the order of the scenes.
    """

    write: Callable[[ExportJob], list[Any]]
    finish: Callable[[Path, Split, list[Any]], None] | None = None


def _image(scene: Scene) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(scene.image.transpose(1, 2, 0)))


def _made(folder: Path) -> Path:
    """Make a folder unless it exists, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save_jpeg(scene: Scene, target: Path | io.BytesIO) -> None:
    _image(scene).save(target, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)


def _write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data) + "\n")


def _write_image_folder(job: ExportJob) -> list[Any]:
    """Write `train/red_circle/000000.png`: one folder per class; PNG, to preserve the exact pixels."""
    for index, scene in job.scenes():
        folder = _made(job.root / job.split / CLASSES[scene.label].replace(" ", "_"))
        _image(scene).save(folder / f"{index:06d}.png", compress_level=1)
    return []


def _write_webdataset(job: ExportJob) -> list[Any]:
    """Write `train-000000.tar`, 500 scenes each.

    Members: .jpg, .cls (class index), .txt (a caption) and .json (class and objects).
    """
    path = job.root / f"{job.split}-{job.number:06d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, scene in job.scenes():
            image = io.BytesIO()
            _save_jpeg(scene, image)
            text = caption(scene, index, split=job.split, seed=job.settings.seed)
            _add(tar, f"{job.split}{index:08d}.jpg", image.getvalue())
            _add(tar, f"{job.split}{index:08d}.cls", str(scene.label).encode())
            _add(tar, f"{job.split}{index:08d}.txt", text.encode())
            _add(tar, f"{job.split}{index:08d}.json", json.dumps(_facts(scene)).encode())
    return []


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


def _write_ade20k(job: ExportJob) -> list[Any]:
    """Write `images/training/ADE_train_00000001.jpg` and `annotations/training/ADE_train_00000001.png`.

    As in ADE20K, an annotation's 0 is void, which no pixel has here, and label i is line i of `classes.txt`:
    the background, then the ten shapes. The background and so the objects' borders therefore count.
    """

    images, masks = (_made(job.root / kind / _ADE_FOLDERS[job.split]) for kind in ("images", "annotations"))
    for index, scene in job.scenes():
        name = f"ADE_{job.split}_{index + 1:08d}"
        _save_jpeg(scene, images / f"{name}.jpg")
        Image.fromarray(semantic(scene) + 1).save(masks / f"{name}.png")
    return []


def _finish_ade20k(root: Path, split: Split, records: list[Any]) -> None:
    write_text(root / "classes.txt", "".join(f"{name}\n" for name in ("background", *SHAPES)))


def _write_coco(job: ExportJob) -> list[Any]:
    """Write `train/000000000001.jpg`, `annotations/instances_train.json` and its captions; likewise `val`.

    Categories are the ten shapes (1 to 10); segmentations are compressed run lengths, since rings have holes
    and objects occlude each other; each caption template gives one caption.
    """

    records = []
    for index, scene in job.scenes():
        name = f"{index + 1:012d}.jpg"
        _save_jpeg(scene, _made(job.root / job.split) / name)
        image = {"id": index + 1, "file_name": name, "width": job.settings.size, "height": job.settings.size}
        records.append((image, _instances(scene), captions(scene)))
    return records


def _finish_coco(root: Path, split: Split, records: list[Any]) -> None:
    images = [image for image, _, _ in records]
    instances = [{"image_id": image["id"], **item} for image, items, _ in records for item in items]
    annotations = [
        {"image_id": image["id"], "caption": text} for image, _, texts in records for text in texts
    ]
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, start=1)]
    head = {"info": {"description": f"generated scenes, {split}"}, "licenses": [], "images": images}
    folder = root / "annotations"
    _write_json(
        folder / f"instances_{split}.json",
        {**head, "annotations": _numbered(instances), "categories": categories},
    )
    _write_json(folder / f"captions_{split}.json", {**head, "annotations": _numbered(annotations)})


def _numbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": number, **record} for number, record in enumerate(records, start=1)]


def _instances(scene: Scene) -> list[dict[str, Any]]:
    images = []
    for number, item in enumerate(scene.objects, start=1):
        x0, y0, x1, y1 = item.box
        images.append(
            {
                "category_id": item.shape + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": item.area,
                "iscrowd": 0,
                "segmentation": {
                    "size": list(scene.instances.shape),
                    "counts": compress(run_lengths(scene.instances == number)),
                },
                "colour": COLOURS[item.colour],
            }
        )
    return images


def _write_llava(job: ExportJob) -> list[Any]:
    """Write `train/00000000.jpg`, and for LLaVA's two stages `pretrain_train.json` and `instruct_train.json`.

    The first holds one caption per image, the second questions with one-word answers; the placeholder
    `<image>` precedes the first question.
    """

    records = []
    for index, scene in job.scenes():
        name = f"{job.split}/{index:08d}.jpg"
        _save_jpeg(scene, _made(job.root / job.split) / f"{index:08d}.jpg")
        description = caption(scene, index, split=job.split, seed=job.settings.seed)
        all_questions = questions(scene, index, split=job.split, seed=job.settings.seed)
        head = {"id": f"{job.split}{index:08d}", "image": name}
        turns = [turn for q in all_questions for turn in _turns(f"{q.text}\n{_SHORT_ANSWER}", q.answer)]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        records.append(
            ({**head, "conversations": _turns("<image>", description)}, {**head, "conversations": turns})
        )
    return records


def _finish_llava(root: Path, split: Split, records: list[Any]) -> None:
    _write_json(root / f"pretrain_{split}.json", [pretrain for pretrain, _ in records])
    _write_json(root / f"instruct_{split}.json", [instruct for _, instruct in records])


def _turns(human: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


LAYOUTS: Registry[ExportLayout] = Registry("layout")
LAYOUTS.add("image-folder", ExportLayout(_write_image_folder))
LAYOUTS.add("webdataset", ExportLayout(_write_webdataset))
LAYOUTS.add("ade20k", ExportLayout(_write_ade20k, _finish_ade20k))
LAYOUTS.add("coco", ExportLayout(_write_coco, _finish_coco))
LAYOUTS.add("llava", ExportLayout(_write_llava, _finish_llava))


def write(
    out: Path, settings: ScenesSettings, *, workers: int = 1, progress: Callable[[int], None] | None = None
) -> bool:
    """Write the training and validation scenes to the folder `out`, with metadata `scenes.json`.

    The bytes depend only on the settings. The folder appears once it is complete. `progress` is called with
    the number of scenes finished since its last call.

    Returns:
        True if the folder was written; False if it already holds exactly these scenes.

    Raises:
        ConfigError: an unknown layout.
        SceneError: a setting out of range, or an `out` that is a file or has other content.
    """
    _check(settings, workers)
    metadata = _metadata(settings)

    def fill(folder: Path) -> None:
        _fill(folder, settings, workers, progress or (lambda _: None))
        write_text(folder / METADATA_FILE, json.dumps(metadata, indent=2) + "\n")

    # If another process was faster, its folder must hold these scenes too.
    return _free(out, metadata) and (make_folder(out, fill) or _free(out, metadata))


def write_cached(out: Path, settings: ScenesSettings, damaged: Callable[[str], None]) -> None:
    """Write the scenes to a cache folder, unless it already holds them undamaged.

    A file beside the folder holds a hash of its content. A folder that does not match is written again, after
    a call of `damaged` with the reason; one without such a file, from other versions, is accepted unchecked.
    """
    _check(settings, 1)
    note = out.with_name(f"{out.name}.sha256")
    try:
        if not write(out, settings) and note.exists() and read_text(note) != _digest(out):
            raise SceneError(f"{out}: its files are not those that were written there")
    except RadioError as error:
        damaged(str(error))
        doomed = out.with_name(f".{out.name}.damaged-{secrets.token_hex(4)}")
        out.rename(doomed)  # renamed at once: another process may read it meanwhile
        _remove(doomed)
        if note.is_dir():
            _remove(note)
        note.unlink(missing_ok=True)
        write(out, settings)
    if not note.exists():
        write_text(note, _digest(out))


def _digest(root: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(root).as_posix()} ".encode(errors="surrogateescape"))
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check(settings: ScenesSettings, workers: int) -> None:
    LAYOUTS[settings.layout]
    if max(settings.count, settings.val_count) > _MOST:
        raise SceneError(
            f"--count {settings.count} --val-count {settings.val_count}: give at most {_MOST} of each"
        )
    if settings.count < 1 or settings.val_count < 0:
        raise SceneError(
            f"--count {settings.count} --val-count {settings.val_count}: nothing to write; "
            "give a count of at least 1 and a val-count of at least 0"
        )
    if not MIN_SIZE <= settings.size <= MAX_SIZE:
        raise SceneError(f"--size {settings.size}: choose a side from {MIN_SIZE} to {MAX_SIZE} pixels")
    if not 0 <= settings.seed < 2**63:
        raise SceneError(f"--seed {settings.seed}: choose a whole number from 0 to 2^63 - 1")
    if not 1 <= workers <= _MOST_WORKERS:
        raise SceneError(f"--workers {workers}: choose from 1 to {_MOST_WORKERS}")


def _metadata(settings: ScenesSettings) -> dict[str, Any]:
    names = {"classes": list(CLASSES), "colours": list(COLOURS), "shapes": list(SHAPES)}
    return {"format": "radio-scenes", "version": CARD_VERSION, **asdict(settings), **names}


def _free(out: Path, metadata: dict[str, Any]) -> bool:
    """Check whether `out` must be written; False if it holds the scenes of this metadata already."""
    if out.exists() and not out.is_dir():
        raise SceneError(f"{out} is a file; give the name of a folder")
    if not out.exists() or not any(out.iterdir()):
        return True
    path = out / METADATA_FILE
    if not path.is_file():
        raise SceneError(f"{out} is not empty and was not written by radio-scenes; choose another folder")
    try:
        stored = read_json(path, _CARDS)
    except DataError as error:
        raise SceneError(
            f"{path} is not metadata of radio-scenes ({error}); choose another folder"
        ) from error
    if stored != metadata:
        raise SceneError(
            f"{out} holds scenes of other settings (see {path}); remove it or choose another folder"
        )
    return False


def _fill(root: Path, settings: ScenesSettings, workers: int, progress: Callable[[int], None]) -> None:
    layout = LAYOUTS[settings.layout]
    counts: tuple[tuple[Split, int], ...] = (("train", settings.count), ("val", settings.val_count))
    jobs = [
        ExportJob(root, settings, split, number, start, min(start + _CHUNK, count))
        for split, count in counts
        for number, start in enumerate(range(0, count, _CHUNK))
    ]
    results: dict[ExportJob, list[Any]] = {}
    for job, records in _run(jobs, workers):
        results[job] = records
        progress(job.stop - job.start)
    for split, count in counts:
        if count and layout.finish is not None:
            records = [record for job in jobs if job.split == split for record in results[job]]
            layout.finish(root, split, records)


def _run(jobs: list[ExportJob], workers: int) -> Iterator[tuple[ExportJob, list[Any]]]:
    """Yield each job with its records, in any order."""
    if workers == 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    # spawned, not forked: a fork of a process that runs threads (torch's, BLAS's) may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run_job(job: ExportJob) -> list[Any]:
    """Write the images of one job; return the records for the split's files."""
    return LAYOUTS[job.settings.layout].write(job)


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Compute the run lengths of a [H, W] mask in column order; the first is background, maybe 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate([[0], changes, [mask.size]])
    lengths: list[int] = np.diff(edges).tolist()
    return lengths


def compress(lengths: Sequence[int]) -> str:
    """Encode run lengths in COCO's text form.

    From the fourth run on, a run is written as its difference to the one two before; numbers are split into
    groups of five bits, lowest first, each a character from 48 on, whose sixth bit is set if another follows.
    """
    letters = []
    for place, length in enumerate(lengths):
        rest = length - (lengths[place - 2] if place > 2 else 0)
        more = True
        while more:
            group, rest = rest & 31, rest >> 5
            more = rest != (-1 if group & 16 else 0)
            letters.append(chr(48 + group + 32 * more))
    return "".join(letters)


def decompress(text: str) -> list[int]:
    """Read run lengths in COCO's text form, the inverse of `compress`.

    Raises:
        ValueError: an invalid text: other characters, a truncated number, or numbers of more than 30 bits.
    """
    groups = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if groups.size and (groups.min() < 0 or groups.max() > 63):
        raise ValueError("are no compressed text: a character is none of COCO's 64")
    last = groups & 32 == 0
    if groups.size and not last[-1]:
        raise ValueError("are a text that is cut")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    sizes = ends - starts + 1
    if ends.size and sizes.max() > 6:
        raise ValueError("hold a number of more than 30 bits")
    places = np.arange(groups.size) - np.repeat(starts, sizes)
    values = np.add.reduceat((groups & 31) << 5 * places, starts) if ends.size else ends
    values -= np.where(groups[ends] & 16, 1 << 5 * sizes, 0)
    # From the fourth run on, a difference to the one two before.
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    lengths: list[int] = values.tolist()
    return lengths

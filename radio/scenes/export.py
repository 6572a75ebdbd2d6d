"""Write the world atomically to a folder in the layout of a known data set."""

import hashlib
import io
import json
import multiprocessing
import secrets
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from radio.config import check_options
from radio.errors import DataError, RadioError
from radio.io import make_folder, read_json, read_text, write_text
from radio.registry import Registry

from .detector import label_of_object, search
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
    count: Annotated[int, Interval(ge=1, le=_MOST)] = 2000
    val_count: Annotated[int, Interval(ge=0, le=_MOST)] = 200
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    size: Annotated[int, Interval(ge=MIN_SIZE, le=MAX_SIZE)] = 96


class ExportJob(NamedTuple):
    """A range of scenes of one split that one process writes below `root`."""

    root: Path
    settings: ScenesSettings
    split: Split
    number: int  # index of this job among those of its split
    start: int
    stop: int


Files = dict[str, bytes]  # by their paths below the root


class ExportLayout(NamedTuple):
    """The files of one data set.

    `make` makes the files of a scene from (scene, index, split, seed), in any order and process, and a record
    for the files of the whole split; `finish` writes these, from the records in the order of the scenes. With
    `tar` the files of a job are the members of one tar file.
    """

    make: Callable[[Scene, int, Split, int], tuple[Files, Any]]
    finish: Callable[[Path, Split, list[Any]], None] | None = None
    tar: bool = False


def _encode(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, **options)
    return data.getvalue()


def _pixels(scene: Scene) -> NDArray[np.uint8]:
    return np.ascontiguousarray(scene.image.transpose(1, 2, 0))


def _jpeg(scene: Scene) -> bytes:
    return _encode(_pixels(scene), format="JPEG", quality=_JPEG_QUALITY, subsampling=0)


def _write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data) + "\n")


def _image_folder(scene: Scene, index: int, split: Split, seed: int) -> tuple[Files, None]:
    """Make `train/red_circle/000000.png`: one folder per class; PNG, to preserve the exact pixels."""
    name = f"{split}/{CLASSES[scene.label].replace(' ', '_')}/{index:06d}.png"
    return {name: _encode(_pixels(scene), format="PNG", compress_level=1)}, None


def _webdataset(scene: Scene, index: int, split: Split, seed: int) -> tuple[Files, None]:
    """Make .jpg, .cls (class index), .txt (a caption) and .json (class and objects), members of a tar."""
    objects = [
        {"shape": SHAPES[o.shape], "colour": COLOURS[o.colour], "box": o.box, "area": o.area, "main": o.main}
        for o in scene.objects
    ]
    facts = {"label": scene.label, "class": CLASSES[scene.label], "objects": objects}
    key = f"{split}{index:08d}"
    return {
        f"{key}.jpg": _jpeg(scene),
        f"{key}.cls": str(scene.label).encode(),
        f"{key}.txt": caption(scene, index, split=split, seed=seed).encode(),
        f"{key}.json": json.dumps(facts).encode(),
    }, None


def _ade20k(scene: Scene, index: int, split: Split, seed: int) -> tuple[Files, None]:
    """Make `images/training/ADE_train_00000001.jpg` and `annotations/training/ADE_train_00000001.png`.

    As in ADE20K, an annotation's 0 is void, which no pixel has here, and label i is line i of `classes.txt`:
    the background, then the ten shapes. The background and so the objects' borders therefore count.
    """
    name = f"{_ADE_FOLDERS[split]}/ADE_{split}_{index + 1:08d}"
    mask = _encode(semantic(scene) + 1, format="PNG")
    return {f"images/{name}.jpg": _jpeg(scene), f"annotations/{name}.png": mask}, None


def _finish_ade20k(root: Path, split: Split, records: list[Any]) -> None:
    write_text(root / "classes.txt", "".join(f"{name}\n" for name in ("background", *SHAPES)))


def _coco(scene: Scene, index: int, split: Split, seed: int) -> tuple[Files, Any]:
    """Make `train/000000000001.jpg`, `annotations/instances_train.json` and its captions; likewise `val`.

    Categories are the ten shapes (1 to 10); segmentations are compressed run lengths, since rings have holes
    and objects occlude each other; each caption template gives one caption.
    """
    image, instances = _annotate(scene, index, [item.shape + 1 for item in scene.objects])
    colours = [
        {**item, "colour": COLOURS[o.colour]} for item, o in zip(instances, scene.objects, strict=True)
    ]
    return {f"{split}/{image['file_name']}": _jpeg(scene)}, (image, colours, captions(scene))


def _annotate(
    scene: Scene, index: int, categories: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make COCO's records of an image and of its instances, whose categories' ids are given."""
    height, width = scene.instances.shape
    image = {"id": index + 1, "file_name": f"{index + 1:012d}.jpg", "width": width, "height": height}
    instances = []
    for number, (item, category) in enumerate(zip(scene.objects, categories, strict=True), start=1):
        x0, y0, x1, y1 = item.box
        runs = compress(run_lengths(scene.instances == number))
        instances.append(
            {
                "category_id": category,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": item.area,
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": runs},
            }
        )
    return image, instances


def _finish_coco(root: Path, split: Split, records: list[Any]) -> None:
    images = [image for image, _, _ in records]
    instances = _of_images((image, items) for image, items, _ in records)
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


def _of_images(records: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [{"image_id": image["id"], **item} for image, items in records for item in items]


def _lvis(scene: Scene, index: int, split: Split, seed: int) -> tuple[Files, Any]:
    """Make `val/000000000001.jpg`, `annotations/lvis_val.json` and `detections_val.json`; likewise `train`.

    Categories are the 60 classes (1 to 60), of which each image was searched for its own and a few others.
    The detections are those of `search`, as COCO results.
    """
    found = search(scene, index, split=split, seed=seed)
    image, instances = _annotate(scene, index, [label_of_object(item) + 1 for item in scene.objects])
    image["neg_category_ids"] = [label + 1 for label in found.absent]
    image["not_exhaustive_category_ids"] = [label + 1 for label in found.not_exhaustive]
    detections = []
    for label, (x0, y0, x1, y1), score in found.boxes:
        box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
        detections.append({"category_id": label + 1, "bbox": box, "score": score})
    return {f"{split}/{image['file_name']}": _jpeg(scene)}, (image, instances, detections)


def _finish_lvis(root: Path, split: Split, records: list[Any]) -> None:
    """Write the annotations; the rarest third of the classes is called rare, the next common (ours)."""
    images = [image for image, _, _ in records]
    counts = Counter(id for _, items, _ in records for id in {item["category_id"] for item in items})
    order = sorted(range(1, len(CLASSES) + 1), key=lambda id: (counts[id], id))
    marks = {id: "rcf"[3 * place // len(order)] for place, id in enumerate(order)}
    categories = [
        {"id": id, "name": name, "frequency": marks[id], "image_count": counts[id]}
        for id, name in enumerate(CLASSES, start=1)
    ]
    instances = _of_images((image, items) for image, items, _ in records)
    content = {"images": images, "annotations": _numbered(instances), "categories": categories}
    _write_json(root / "annotations" / f"lvis_{split}.json", content)
    detections = _of_images((image, found) for image, _, found in records)
    _write_json(root / "annotations" / f"detections_{split}.json", detections)


def _numbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": number, **record} for number, record in enumerate(records, start=1)]


def _llava(scene: Scene, index: int, split: Split, seed: int) -> tuple[Files, Any]:
    """Make `train/00000000.jpg`, and for LLaVA's two stages `pretrain_train.json` and `instruct_train.json`.

    The first holds one caption per image, the second questions with one-word answers; the placeholder
    `<image>` precedes the first question.
    """
    name = f"{split}/{index:08d}.jpg"
    description = caption(scene, index, split=split, seed=seed)
    all_questions = questions(scene, index, split=split, seed=seed)
    head = {"id": f"{split}{index:08d}", "image": name}
    turns = [turn for q in all_questions for turn in _turns(f"{q.text}\n{_SHORT_ANSWER}", q.answer)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    pretrain = {**head, "conversations": _turns("<image>", description)}
    return {name: _jpeg(scene)}, (pretrain, {**head, "conversations": turns})


def _finish_llava(root: Path, split: Split, records: list[Any]) -> None:
    _write_json(root / f"pretrain_{split}.json", [pretrain for pretrain, _ in records])
    _write_json(root / f"instruct_{split}.json", [instruct for _, instruct in records])


def _turns(human: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


LAYOUTS: Registry[ExportLayout] = Registry("layout")
LAYOUTS.add("image-folder", ExportLayout(_image_folder))
LAYOUTS.add("webdataset", ExportLayout(_webdataset, tar=True))
LAYOUTS.add("ade20k", ExportLayout(_ade20k, _finish_ade20k))
LAYOUTS.add("coco", ExportLayout(_coco, _finish_coco))
LAYOUTS.add("lvis", ExportLayout(_lvis, _finish_lvis))
LAYOUTS.add("llava", ExportLayout(_llava, _finish_llava))


def write(
    out: Path, settings: ScenesSettings, *, workers: int = 1, progress: Callable[[int], None] | None = None
) -> bool:
    """Write the training and validation scenes to the folder `out`, with metadata `scenes.json`.

    The bytes depend only on the settings. The folder appears once it is complete. `progress` is called with
    the number of scenes finished since its last call.

    Returns:
        True if the folder was written; False if it already holds exactly these scenes.

    Raises:
        ConfigError: an unknown layout, or a setting out of range.
        SceneError: an `out` that is a file or has other content.
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
    check_options(settings)
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
    """Write the files of one job's scenes; return the scenes' records for the split's files."""
    layout, seed, size = LAYOUTS[job.settings.layout], job.settings.seed, job.settings.size
    path = job.root / f"{job.split}-{job.number:06d}.tar"
    records = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) if layout.tar else nullcontext() as tar:
        for index in range(job.start, job.stop):
            scene = render(index, split=job.split, seed=seed, size=size)
            files, record = layout.make(scene, index, job.split, seed)
            if record is not None:
                records.append(record)
            for name, data in files.items():
                if tar is None:
                    (job.root / name).parent.mkdir(parents=True, exist_ok=True)
                    (job.root / name).write_bytes(data)
                else:  # without owner and with time 0, so that the bytes depend only on the content
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return records


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

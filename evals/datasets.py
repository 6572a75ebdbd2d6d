"""`radio-eval data`: lists a user's data sets, and checks that each is complete and laid out as published."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.seg_probe.protocol import Layout
from radio.config import to_plain
from radio.datasets import SET_NAMES, DataSets, LlavaFiles, is_remote
from radio.errors import DataError, MissingDataError, MissingExtraError, RadioError, one_line, shown
from radio.io import expand_braces
from radio.progress import watch_on

State = Literal["complete", "found", "missing", "laid out wrong", "not checked", "absent"]

_IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
_NYU_TESTED = 654
_SHIFTED_COUNTS = {"V2": 10_000, "R": 30_000, "A": 7_500, "Sketch": 50_889}
_WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".onnx", ".gguf")
_NOWHERE = "put it there, or name its place in the data.yaml"


class Content(NamedTuple):
    """What a data set holds."""

    text: str  # counts
    notes: tuple[str, ...] = ()
    is_checked: bool = True  # or out of reach


class Part(NamedTuple):
    """A part of a data set that is looked at by itself."""

    name: str
    places: tuple[Path, ...]  # the first is shown; none of a pattern or URL
    check: Callable[[], Content]  # raises MissingDataError, or another RadioError for a wrong layout
    where: str = ""  # default: the first place


class Finding(NamedTuple):
    """The state of a part of a data set."""

    name: str
    where: str = ""
    state: State = "absent"
    content: Content = Content("")
    problem: str = ""


def list_data_sets(sets: DataSets, *, check: bool, plain: bool) -> int:
    """Print a table of the data sets, and a line for every problem; return 1 if there is one, else 0.

    Args:
        sets: the data sets.
        check: also look inside.
        plain: print without progress bars, colours and box lines.
    """
    console, screen = Console(no_color=plain, highlight=False), Console(stderr=True)
    progress = watch_on(screen, shown=screen.is_terminal and not plain)
    parts, findings = list(parts_of(sets)), []
    with progress("checking data sets", len(parts)) as advance:
        for part in parts:
            findings.append(inspect(part, inside=check))
            advance(1)
    names = {name for name, value in to_plain(sets).items() if value is None}
    findings += [Finding(name) for name in SET_NAMES if name.replace("-", "_") in names]
    console.print(_table(findings, plain=plain))
    for finding in findings:
        lines = [f"{finding.state}: {finding.problem}"] if finding.problem else []
        for line in (*lines, *finding.content.notes):
            console.print(escape(shown(f"{finding.name}: {line}")), soft_wrap=True)
    return int(any(finding.problem for finding in findings))


def _table(findings: Sequence[Finding], *, plain: bool) -> Table:
    table = Table(box=box.ASCII if plain else box.ROUNDED)
    table.add_column("data set", no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("holds", overflow="fold")
    table.add_column("state", no_wrap=True)
    for finding in findings:
        cells = (finding.name, finding.where, finding.content.text, finding.state)
        table.add_row(*(escape(shown(cell)) for cell in cells))
    return table


def inspect(part: Part, *, inside: bool) -> Finding:
    """Look whether a part of a data set is there, and `inside` it what it holds."""
    where = part.where or str(part.places[0])
    try:
        absent = next((place for place in part.places if not place.exists()), None)
        if absent is not None:
            raise MissingDataError(f"{absent}: no such file or folder; {_NOWHERE}")
        if not inside:
            return Finding(part.name, where, "found" if part.places else "not checked")
        content = part.check()
        return Finding(part.name, where, "complete" if content.is_checked else "not checked", content)
    except (RadioError, OSError) as error:
        state: State = "laid out wrong"
        if isinstance(error, MissingDataError):
            state = "missing"
        elif isinstance(error, MissingExtraError | OSError):
            state = "not checked"
        return Finding(part.name, where, state, problem=one_line(error) or "")


def parts_of(sets: DataSets) -> Iterator[Part]:
    """Yield the parts of the data sets that are named, in the order of the fields."""
    yield from _parts_of_imagenet(sets)
    shards = {"imagenet-21k": sets.imagenet_21k, "laion": sets.laion, "datacomp": sets.datacomp}
    for name, pattern in shards.items():
        if pattern is not None:
            is_place = not is_remote(pattern) and "{" not in pattern
            yield Part(name, (Path(pattern),) if is_place else (), partial(check_shards, pattern), pattern)
    yield from _parts_of_maps(sets)
    if sets.coco is not None:
        file, images = sets.coco / "annotations" / "instances_val2017.json", sets.coco / "val2017"
        yield Part("coco", (sets.coco, file, images), partial(check_coco, file, images))
    if (lvis := sets.lvis) is not None:
        places = (lvis.annotations, lvis.images)
        yield Part("lvis", places, partial(check_coco, *places))
    yield from _landmarks_and_pairs(sets)
    if sets.llava is not None:
        yield from _parts_of_llava(sets.llava)
    yield from _benchmarks(sets)
    if (folder := sets.language_model) is not None:
        yield Part("language-model", (folder,), partial(check_language_model, folder))
    if (folder := sets.weights) is not None:
        yield Part("weights", (folder,), partial(check_weights, folder))


def _parts_of_maps(sets: DataSets) -> Iterator[Part]:
    """Yield the parts of the data sets that have a class or a depth for every pixel."""
    if sets.ade20k is not None:
        yield Part("ade20k", (sets.ade20k,), partial(check_segmentation, sets.ade20k, "ade20k"))
    layouts: dict[Layout, Path | None] = {
        "voc": sets.voc,
        "context": sets.context,
        "coco-stuff": sets.coco_stuff,
    }
    for layout, folder in layouts.items():
        if folder is not None:
            yield Part(layout, (folder,), partial(check_segmentation, folder, layout))
    if (root := sets.nyu) is not None:
        for split in ("train", "test"):
            yield Part(f"nyu {split}", (root, root / f"nyu_{split}.txt"), partial(check_nyu, root, split))


def check_imagenet(root: Path, split: str) -> Content:
    """Count the images and classes of a split of ImageNet; val has to have the classes of train.

    Raises:
        DataError: another layout.
        MissingDataError: a class that the other split has.
    """
    from radio.image_files import count_images

    folder = root / split
    if not _folders(folder) and folder.is_dir():
        packed = any(folder.glob("*.tar"))
        what = "tar files: unpack each" if packed else "no folder a class: move each image"
        raise DataError(f"{folder}: holds {what} into the folder of its class (val: as valprep.sh does)")
    counts = count_images(folder)
    if split == "val":
        for here, there in (("val", "train"), ("train", "val")):
            classes = _folders(root / there)
            lacking = sorted(classes - _folders(root / here))
            if lacking and (root / here).is_dir():
                raise MissingDataError(
                    f"{root / here / lacking[0]}: no such folder ({len(lacking):,} of the {len(classes):,} "
                    f"classes of {there} are not in {here}); unpack the whole of it"
                )
    num_images, published = sum(counts.values()), _IMAGENET_COUNTS[split]
    note = f"{num_images:,} images; ImageNet's {split} has {published:,}"
    text = f"{num_images:,} images of {len(counts):,} classes"
    return Content(text, () if num_images == published else (note,))


def _parts_of_imagenet(sets: DataSets) -> Iterator[Part]:
    if (root := sets.imagenet) is not None:
        yield Part("imagenet train", (root / "train",), partial(check_imagenet, root, "train"))
        yield Part("imagenet val", (root / "val",), partial(check_imagenet, root, "val"))
    others = {"V2": sets.imagenet_v2, "R": sets.imagenet_r, "A": sets.imagenet_a}
    for name, folder in {**others, "Sketch": sets.imagenet_sketch}.items():
        if folder is not None:
            yield Part(f"imagenet-{name.lower()}", (folder,), partial(check_classes, folder, name))


def check_classes(folder: Path, name: str) -> Content:
    """Count the images and classes of ImageNet-V2, -R, -A or -Sketch; each class has to be one of ImageNet's.

    Raises:
        DataError: another layout, or a folder that is neither a WordNet id nor a number of ImageNet's.
    """
    from radio.data import imagenet_numbers, one_form
    from radio.image_files import count_images

    counts, numbers = count_images(folder), imagenet_numbers()
    known = {*numbers, *map(str, numbers.values())}
    foreign = [each for each in counts if one_form(each) not in known]
    if foreign:
        raise DataError(
            f"{folder / foreign[0]}: is none of ImageNet's classes; wanted their WordNet ids, or numbers "
            f"from 0 to 999"
        )
    num_images, published = sum(counts.values()), _SHIFTED_COUNTS[name]
    note = f"{num_images:,} images; ImageNet-{name} has {published:,}"
    text = f"{num_images:,} images of {len(counts):,} classes"
    return Content(text, () if num_images == published else (note,))


def _folders(folder: Path) -> set[str]:
    """Return the names of the folders in a folder; none where it is absent."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def check_shards(pattern: str) -> Content:
    """Count shards, check that each is there and not empty, and index the first.

    Raises:
        DataError: a folder without tar files, an empty shard, or a first one that is none.
        MissingDataError: a shard of the pattern is absent.
    """
    from radio.tar import index_shard

    if is_remote(pattern):
        return Content(f"{len(expand_braces(pattern)):,} remote shards", is_checked=False)
    folder = Path(pattern)
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise DataError(f"{folder}: holds no tar files; name the folder of the shards, or a pattern")
    else:
        paths = [Path(name) for name in expand_braces(pattern)]
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    absent = [path for path, size in zip(paths, sizes, strict=True) if size is None]
    if absent:
        raise MissingDataError(
            f"{absent[0]}: no such shard ({len(absent)} of {len(paths):,} are absent); fetch it, or mend the "
            f"pattern"
        )
    empty = [path for path, size in zip(paths, sizes, strict=True) if not size]
    if empty:
        raise DataError(
            f"{empty[0]}: an empty file ({len(empty)} of {len(paths):,} shards are); fetch it again"
        )
    images = len(index_shard(paths[0], labelled=False).samples)
    if not images:
        raise DataError(f"{paths[0]}: holds no images; wanted samples such as 000.jpg")
    total = sum(size for size in sizes if size)
    return Content(f"{len(paths):,} shards, {_gigabytes(total)}, {images:,} images in the first")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def check_segmentation(root: Path, layout: Layout) -> Content:
    """Count the images of a data set of label maps; each has to have its annotation.

    Raises:
        DataError: another layout.
        MissingDataError: a folder, an image or an annotation is absent.
    """
    from .seg_probe.classes import KNOWN_CLASSES
    from .seg_probe.layouts import open_dataset

    names = {"ade20k": "ADE20K", "voc": "VOC2012"}
    if layout in names:
        data = open_dataset(root, voc_split=None, known=KNOWN_CLASSES)
        found = "ade20k" if data.labelling.zero_is_void else "voc"
        if layout != found:
            raise DataError(f"{root}: is in the layout of {names[found]}; wanted {names[layout]}'s")
    else:
        data = open_dataset(root, voc_split=None, known=KNOWN_CLASSES, layout=layout, parts=("val",))
    splits, notes = [split for split in (data.train, data.val) if split.pairs], data.notes
    lists = Path(data.train.location) / "ImageSets" / "Segmentation"
    if layout == "voc" and any((lists / f"{each}.txt").is_file() for each in ("trainaug", "aug")):
        more = open_dataset(root, voc_split="trainaug", known=KNOWN_CLASSES)
        splits.append(more.train)
        notes = tuple(dict.fromkeys((*notes, *more.notes)))
    counts = ", ".join(f"{split.name.rpartition('/')[2]} {len(split.pairs):,}" for split in splits)
    return Content(f"images with annotations: {counts}", notes)


def check_nyu(root: Path, split: str) -> Content:
    """Count the images of a split of NYU Depth V2; each has to have its depth map.

    Raises:
        DataError: as `evals.depth.data.list_nyu`.
    """
    from .depth.data import list_nyu

    num_images = len(list_nyu(root, split))
    note = f"{num_images:,} images; NYU's test has {_NYU_TESTED}"  # several lists of train are about
    is_usual = split == "train" or num_images == _NYU_TESTED
    return Content(f"{num_images:,} images with depth", () if is_usual else (note,))


def check_coco(file: Path, images: Path) -> Content:
    """Count COCO's images and instances; each image has to be there in the size that the file says.

    Raises:
        DataError: as `evals.sam_dropin.data.open_instances`.
    """
    from .sam_dropin.data import open_instances

    data = open_instances(file, images, limit=None, crowds=True, smallest_area=0, memo=None, empty=True)
    return Content(f"{len(data.images):,} images, {data.count:,} instances", data.notes)


def _landmarks_and_pairs(sets: DataSets) -> Iterator[Part]:
    folders = {"roxford5k": sets.roxford5k, "rparis6k": sets.rparis6k, "spair": sets.spair}
    for name, folder in folders.items():
        if folder is not None:
            yield Part(name, (folder,), partial(check_spair if name == "spair" else check_landmarks, folder))


def check_landmarks(root: Path) -> Content:
    """Count the images and queries of ROxford5k or RParis6k; each image has to be there.

    Raises:
        DataError: as `evals.retrieval.data.open_landmarks`.
    """
    from .retrieval.data import open_landmarks

    data = open_landmarks(root, limit=None, memo=None)
    return Content(f"{len(data.database.keys):,} images, {len(data.queries.keys):,} queries")


def check_spair(root: Path) -> Content:
    """Count SPair-71k's test pairs and their images; each image has to be there.

    Raises:
        DataError: as `evals.correspondence.data.open_spair`.
    """
    from .correspondence.data import open_spair

    data = open_spair(root, pairs_per_class=None, memo=None)
    pairs = sum(len(block) for block in data.blocks)
    return Content(f"{pairs:,} pairs of {len(data.images.keys):,} images, {len(data.blocks)} classes")


def _parts_of_llava(files: LlavaFiles) -> Iterator[Part]:
    for stage, data, images in (
        ("pretrain", files.pretrain_data, files.pretrain_images),
        ("instruct", files.instruct_data, files.instruct_images),
    ):
        yield Part(
            f"llava {stage}",
            (data, images),
            partial(check_conversations, data, images, text_only=stage == "instruct"),
        )


def check_conversations(file: Path, images: Path, *, text_only: bool) -> Content:
    """Count the records of LLaVA's training data; each has to be usable, with its image.

    Args:
        file: the records.
        images: the folder or tar file of their images.
        text_only: whether records without an image are allowed.

    Raises:
        DataError: not such a file, or records that cannot be used.
        MissingDataError: only images are absent.
    """
    from .vqa.data import NamedImages, read_records

    files, exists = NamedImages(images), dict[str, bool]()
    absent: list[str] = []  # by record

    def is_image(name: str) -> bool:
        if name not in exists:
            exists[name] = name in files
        absent.extend([] if exists[name] else [name])
        return exists[name]

    reading = read_records(file, is_image, max_error_fraction=1.0)
    if reading.unusable and len(absent) == reading.num_unusable:
        raise MissingDataError(
            f"{images / absent[0]}: no such image ({len(set(absent)):,} of the {len(exists):,} images of "
            f"{file.name} are not there, for {len(absent):,} records); unpack the whole of them"
        )
    if reading.unusable:
        raise DataError(f"{file}: {reading.unusable}; mend or remove them")
    blank = [record.id for record in reading.records if record.image is None]
    if blank and not text_only:
        raise DataError(
            f"{file}: {len(blank):,} records have no image, the first has the id {blank[0]}; the projector "
            f"learns from images only, remove them"
        )
    return Content(f"{len(reading.records):,} records, {len(exists):,} images", reading.notes)


def _benchmarks(sets: DataSets) -> Iterator[Part]:
    from .vqa import benchmark_files

    all_files: Mapping[Any, Any] = benchmark_files(
        sets, ocr=sets.textvqa is not None and sets.textvqa.ocr is not None
    )
    names = {"gqa": "gqa", "textvqa": "textvqa", "scienceqa": "sqa", "vqav2": "vqav2", "pope": "pope"}
    for task, name in names.items():
        if (files := all_files.get(task)) is not None:
            given = (files.questions, files.annotations, files.splits, files.ocr_file, files.images)
            places = tuple(path for path in given if path is not None)
            yield Part(name, places, partial(check_benchmark, task, files))


def check_benchmark(task: Any, files: Any) -> Content:
    """Count the questions of a benchmark and their images.

    Raises:
        DataError: as `evals.vqa.benchmarks.open_benchmark`.
        MissingDataError: images are absent.
    """
    from .vqa.benchmarks import open_benchmark

    benchmark = open_benchmark(task, files)
    benchmark.check()
    images = {question.image for question in benchmark.questions}
    notes = () if benchmark.has_answers else ("its answers are not public: a submission is written",)
    return Content(
        f"{benchmark.split}: {len(benchmark.questions):,} questions, {len(images):,} images", notes
    )


def check_language_model(folder: Path) -> Content:
    """Tell the kind and size of a language model.

    Raises:
        CheckpointError: no language model, or a part of one.
        MissingExtraError: transformers is not installed.
    """
    from .vqa.language import check_folder, load_library

    load_library()
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; wanted a Hugging Face folder")
    config = check_folder(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return Content(f"{config.model_type}, {_gigabytes(size)}")


def check_weights(folder: Path) -> Content:
    """Count the files of weights in a folder, at any depth.

    Raises:
        DataError: there is none, or an empty one.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _WEIGHTS]
    if not files:
        raise DataError(f"{folder}: holds no weights; wanted files such as sam_vit_h.pth, model.safetensors")
    empty = [path for path in files if not path.stat().st_size]
    if empty:
        raise DataError(f"{empty[0]}: an empty file ({len(empty)} of {len(files)} are); fetch it again")
    return Content(f"{len(files)} files, {_gigabytes(sum(path.stat().st_size for path in files))}")

"""A user's data sets, named once: in a `data.yaml`, or by the names of the folders that hold them.

imagenet: /data/imagenet
datacomp: shards/{00000000..00001287}.tar
gqa: {questions: gqa/testdev_balanced_questions.json, images: gqa/images}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from .config import ReadWith, check, from_plain, load_yaml
from .errors import ConfigError, shown
from .io import brief

T = TypeVar("T")

FILE = "data.yaml"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of a pipe or a URL of shards


class Part(NamedTuple):
    """Annotation of a part of a data set: its usual places below the set's folder.

    `splits` has the places of one split alone, and that split as the name of the set's first part writes it.
    """

    places: tuple[str, ...]
    splits: Mapping[str, str] = MappingProxyType({})


class Home(NamedTuple):
    """Annotation of a data set: its usual folders, and what at least one of is in such a folder."""

    folders: tuple[str, ...]
    marks: tuple[str, ...]  # patterns


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaFiles:
    """The training data of LLaVA-1.5: captions for its first stage, conversations for its second."""

    pretrain_data: Annotated[
        Path, Part(("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "blip_laion_cc_sbu_558k.json"))
    ]
    pretrain_images: Annotated[Path, Part(("LLaVA-Pretrain/images", "LLaVA-Pretrain", "images"))]
    """The folder (or tar file) that has 00453/004539375.jpg."""
    instruct_data: Annotated[
        Path,
        Part(
            (
                "llava_v1_5_mix665k.json",
                "LLaVA-Instruct-150K/llava_v1_5_mix665k.json",
                "LLaVA-Tuning/llava_v1_5_mix665k.json",
            )
        ),
    ]
    instruct_images: Annotated[Path, Part(("data", "."))]
    """The folder (or tar file) that has coco/, gqa/, ocr_vqa/, textvqa/ and vg/."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GqaFiles:
    """GQA: questions with their answers, and the images."""

    questions: Annotated[
        Path,
        Part(
            (
                "testdev_balanced_questions.json",
                "questions1.2/testdev_balanced_questions.json",
                "questions/testdev_balanced_questions.json",
                "val_balanced_questions.json",
                "questions1.2/val_balanced_questions.json",
                "questions/val_balanced_questions.json",
            )
        ),
    ]
    images: Annotated[Path, Part(("images", "data/images"))]

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextVqaFiles:
    """TextVQA: questions with their answers, the images, and the tokens of an OCR."""

    questions: Annotated[Path, Part(("TextVQA_0.5.1_val.json",))]
    images: Annotated[Path, Part(("train_images", "train_val_images/train_images", "images"))]
    ocr: Annotated[Path | None, Part(("TextVQA_Rosetta_OCR_v0.2_val.json",))] = None

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScienceQaFiles:
    """ScienceQA: problems with their answers, which split each is in, and the images."""

    questions: Annotated[Path, Part(("problems.json", "data/scienceqa/problems.json"))]
    splits: Annotated[Path, Part(("pid_splits.json", "data/scienceqa/pid_splits.json"))]
    images: Annotated[Path, Part(("images", "data/scienceqa/images", "test", "."))]
    """The folder that has test/1/image.png, or 1/image.png."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vqav2Files:
    """VQAv2: questions, the answers where they are public, and COCO's images."""

    questions: Annotated[
        Path,
        Part(
            (
                "v2_OpenEnded_mscoco_val2014_questions.json",
                "v2_OpenEnded_mscoco_test-dev2015_questions.json",
            )
        ),
    ]
    images: Annotated[
        Path,
        Part(("val2014", "test2015", "images"), {"val2014": "val2014", "test2015": "test-dev2015"}),
    ]
    answers: Annotated[
        Path | None,
        Part(
            ("v2_mscoco_val2014_annotations.json",),
            {"v2_mscoco_val2014_annotations.json": "val2014"},
        ),
    ] = None

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PopeFiles:
    """POPE on COCO: its three files of questions, and COCO's images."""

    questions: Annotated[Path, Part(("coco", "output/coco", "."))]
    """The folder of coco_pope_random.json and the like, or one of them."""
    images: Annotated[Path, Part(("val2014", "images"))]

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LvisFiles:
    """LVIS: its annotations, and COCO's images of 2017, which it divides otherwise."""

    annotations: Annotated[Path, Part(("lvis_v1_val.json", "annotations/lvis_v1_val.json"))]
    images: Annotated[Path, Part(("images", "."))]
    """The folder that has train2017/ and val2017/."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


def _read_parts(kind: type[T], value: Any, _: Mapping[str, Any], where: str) -> T | None:
    """Read the parts of a data set from a mapping, or find them at their usual places in a folder."""
    if value is None:
        return None
    if isinstance(value, str):
        return _find_parts(kind, Path(value))
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
        raise ConfigError(f"{where}: wanted its folder, or a mapping with {names}; got {brief(value)}")
    return from_plain(kind, value, where)


def _parts(kind: type[Any]) -> ReadWith:
    return ReadWith(partial(_read_parts, kind))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSets:
    """Where a user's data sets are; those that are not there are None."""

    imagenet: Annotated[Path | None, Home(("imagenet", "imagenet-1k", "ILSVRC2012"), ("train", "val"))] = None
    """The folder that has train/ and val/, each with one folder a class."""
    imagenet_v2: Annotated[
        Path | None,
        Home(("imagenet-v2", "imagenet_v2", "imagenetv2-matched-frequency-format-val"), ("0", "n01440764")),
    ] = None
    """ImageNet-V2: the folder that has a folder for each class, by number or WordNet id."""
    imagenet_r: Annotated[Path | None, Home(("imagenet-r", "imagenet_r"), ("n01443537",))] = None
    """ImageNet-R: the folder that has its 200 classes, by WordNet id."""
    imagenet_a: Annotated[Path | None, Home(("imagenet-a", "imagenet_a"), ("n01498041",))] = None
    """ImageNet-A: likewise."""
    imagenet_sketch: Annotated[
        Path | None, Home(("imagenet-sketch", "imagenet_sketch", "sketch"), ("n01440764",))
    ] = None
    """ImageNet-Sketch: likewise, of 1,000 classes."""
    imagenet_21k: Annotated[str | None, Home(("imagenet-21k", "imagenet_21k"), ("*.tar",))] = None
    """Shards: a pattern, or a folder of tar files."""
    laion: Annotated[str | None, Home(("laion",), ("*.tar",))] = None
    """Shards, as above."""
    datacomp: Annotated[str | None, Home(("datacomp/shards", "datacomp"), ("*.tar",))] = None
    """Shards, as above."""
    ade20k: Annotated[
        Path | None,
        Home(("ade20k", "ADE20K", "ADEChallengeData2016"), ("images", "annotations", "ADEChallengeData2016")),
    ] = None
    """The folder that has images/ and annotations/."""
    voc: Annotated[
        Path | None,
        Home(("voc", "VOCdevkit", "VOC2012"), ("JPEGImages", "VOC2012", "VOCdevkit")),
    ] = None
    """The folder that has JPEGImages/, SegmentationClass/ and ImageSets/, or its parent."""
    context: Annotated[
        Path | None,
        Home(
            ("context", "pascal-context", "VOC2010"),
            ("SegmentationClassContext", "VOC2010", "VOCdevkit/VOC2010"),
        ),
    ] = None
    """Pascal Context: the folder that has JPEGImages/, SegmentationClassContext/ and
    ImageSets/SegmentationContext/, or its parent."""
    coco_stuff: Annotated[
        Path | None,
        Home(
            ("coco-stuff", "coco_stuff", "coco_stuff164k"),
            ("images/val2017", "annotations/val2017", "coco_stuff164k"),
        ),
    ] = None
    """COCO-Stuff 164k: the folder that has images/ and annotations/ (*_labelTrainIds.png), or its parent."""
    nyu: Annotated[Path | None, Home(("nyu", "nyu_depth_v2", "NYU"), ("nyu_train.txt", "nyu_test.txt"))] = (
        None
    )
    """NYU Depth V2: the folder that has nyu_train.txt, nyu_test.txt and the files that they name."""
    coco: Annotated[
        Path | None, Home(("coco", "COCO"), ("annotations/instances_val2017.json", "val2017"))
    ] = None
    """The folder that has val2017/ and annotations/instances_val2017.json."""
    lvis: Annotated[
        LvisFiles | None,
        Home(("lvis", "LVIS"), ("lvis_v1_val.json", "annotations/lvis_v1_val.json")),
        _parts(LvisFiles),
    ] = None
    """LVIS: the folder that has lvis_v1_val.json, train2017/ and val2017/, or each part."""
    roxford5k: Annotated[Path | None, Home(("roxford5k", "ROxford5k"), ("gnd_roxford5k.*",))] = None
    """The folder that has jpg/ and gnd_roxford5k.json."""
    rparis6k: Annotated[Path | None, Home(("rparis6k", "RParis6k"), ("gnd_rparis6k.*",))] = None
    """The folder that has jpg/ and gnd_rparis6k.json."""
    spair: Annotated[Path | None, Home(("spair", "SPair-71k"), ("PairAnnotation",))] = None
    """SPair-71k: the folder that has PairAnnotation/test/ and JPEGImages/."""
    llava: Annotated[
        LlavaFiles | None,
        Home(
            ("llava", "LLaVA", "playground/data"),
            (
                "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                "blip_laion_cc_sbu_558k.json",
                "llava_v1_5_mix665k.json",
            ),
        ),
        _parts(LlavaFiles),
    ] = None
    """LLaVA-1.5's training data: the folder that has them in LLaVA's own layout, or each part."""
    gqa: Annotated[
        GqaFiles | None,
        Home(("gqa", "GQA"), ("*_balanced_questions.json", "*/*_balanced_questions.json")),
        _parts(GqaFiles),
    ] = None
    """GQA: the folder that has its questions and images/, or each part."""
    textvqa: Annotated[
        TextVqaFiles | None, Home(("textvqa", "TextVQA"), ("TextVQA_0.5.1_val.json",)), _parts(TextVqaFiles)
    ] = None
    """TextVQA: the folder that has its questions and train_images/, or each part."""
    sqa: Annotated[
        ScienceQaFiles | None,
        Home(("sqa", "scienceqa", "ScienceQA"), ("problems.json", "data/scienceqa/problems.json")),
        _parts(ScienceQaFiles),
    ] = None
    """ScienceQA: the folder that has problems.json, pid_splits.json and the images, or each part."""
    vqav2: Annotated[
        Vqav2Files | None,
        Home(("vqav2", "VQAv2"), ("v2_OpenEnded_mscoco_*_questions.json",)),
        _parts(Vqav2Files),
    ] = None
    """VQAv2: the folder that has its questions, its annotations and val2014/, or each part."""
    pope: Annotated[
        PopeFiles | None,
        Home(("pope", "POPE"), ("coco_pope_*.json", "coco/coco_pope_*.json", "output/coco/coco_pope_*.json")),
        _parts(PopeFiles),
    ] = None
    """POPE: the folder that has its questions and val2014/, or each part."""
    language_model: Annotated[
        Path | None, Home(("language-model", "language_model", "vicuna-7b-v1.5"), ("config.json",))
    ] = None
    """A Hugging Face folder with the language model of LLaVA-1.5, Vicuna-7B-v1.5."""
    weights: Annotated[Path | None, Home(("weights",), ("*",))] = None
    """The folder that has the teachers' files."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


SET_NAMES = tuple(field.name.replace("_", "-") for field in fields(DataSets))
"""What a data.yaml may name."""


def read_data_sets(path: Path) -> DataSets:
    """Read where a user's data sets are; nothing in them is read, and what is named need not exist.

    Args:
        path: a data.yaml, whose relative paths count from its folder; or a folder with a data.yaml, or with
            folders that are called as the sets are.

    Raises:
        ConfigError: no such file or folder, a data set or part that is unknown, or a folder without any.
    """
    if not path.exists():
        raise ConfigError(
            f"{shown(path)}: no such file or folder; give a {FILE} that names your data sets, or their folder"
        )
    if not path.is_dir():
        return _read_file(path)
    if (path / FILE).is_file():
        return _read_file(path / FILE)
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(DataSets, include_extras=True).items():
        (home,) = (part for part in hint.__metadata__ if isinstance(part, Home))
        folders = (path / folder for folder in home.folders)
        at = next((folder for folder in folders if _has_mark(folder, home.marks)), None)
        if at is not None:
            found[name] = str(at)
    if not found:
        raise ConfigError(
            f"{shown(path)}: has neither a {FILE} nor a data set's folder; write a {FILE} into it, or call "
            f"the folders {', '.join(SET_NAMES)}"
        )
    return from_plain(DataSets, found)


def is_remote(pattern: str) -> bool:
    """Check whether a pattern of shards is a pipe or a URL, such as https://host/{000..099}.tar."""
    return _SCHEME.match(pattern) is not None


def _has_mark(folder: Path, marks: tuple[str, ...]) -> bool:
    return folder.is_dir() and any(True for mark in marks for _ in folder.glob(mark))


def _read_file(path: Path) -> DataSets:
    data = load_yaml(path)
    if not isinstance(data, Mapping):
        got = "nothing" if data is None else brief(data)
        raise ConfigError(
            f"{shown(path)}: wanted data sets and where they are, as in imagenet: /data/imagenet; got {got}"
        )
    try:
        return from_plain(DataSets, _placed(data, path.absolute().parent))
    except ConfigError as error:
        raise ConfigError(f"{shown(path)}: {error}") from error


def _placed(data: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
    """Write keys as the fields' names, and let relative paths count from the folder."""
    placed: dict[Any, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name in placed:
            raise ConfigError(f"{shown(key)!r} stands there twice, once with _ and once with -; keep one")
        if value == "":
            raise ConfigError(f"{shown(key)}: names nothing; give its place, or leave it out")
        if isinstance(value, Mapping):
            placed[name] = _placed(value, folder)
        elif isinstance(value, str) and not is_remote(value):
            placed[name] = str(folder / _expanded(shown(key), value))
        else:
            placed[name] = value
    return placed


def _expanded(name: str, value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # of ~NAME, or of ~ without a home
        raise ConfigError(
            f"{name}: {shown(value)} begins with the home of a user who has none here; write the whole path"
        ) from error


def _find_parts(kind: type[T], folder: Path) -> T:
    """Find the parts of a data set at their usual places; an absent one is at the first, or None."""
    parts: dict[str, Path | None] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):  # type: ignore[arg-type]
        (part,) = hints[field.name].__metadata__
        first = next(iter(parts.values()), None)
        places = [
            folder / place
            for place in part.places
            if first is None or part.splits.get(place, "") in first.name
        ]
        at = next((place for place in places if place.exists()), None)
        parts[field.name] = places[0] if at is None and field.default is MISSING else at
    return kind(**parts)

"""Segmentation by class names, through a CLIP teacher's text tower: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Machine, late
from evals.seg_probe.protocol import Layout, Scenes
from radio.config import CountOrZero, Pixels, Positive, check
from radio.datasets import DataSets

Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVocabSettings:
    """The class of every pixel by the cosines of patches and class names, in crops."""

    data: Path | None = None
    """A folder in the layout of ADE20K (its own 150 classes, or those of a classes.txt), VOC2012, Pascal
    Context (59 classes) or COCO-Stuff (171). Default: the generated world."""
    layout: Layout | None = None
    """Which of these layouts it is; the model's name in the report then ends in it. Default: told by its
    folders."""
    scenes: Scenes = 300
    """Number of generated images, used without --data."""
    class_names: str | None = None
    """A file with one name per line, in the order of the classes without the background. Default: the data
    set's names, as words (`tvmonitor` as `tv monitor`)."""
    templates: str | None = None
    """`openai` (80), `simple` (7), `scenes` (8), or a file with one template per line, `{}` for the name.
    Default: `scenes` for the generated world, else `openai`."""
    text: str | None = None
    """The teacher whose text tower encodes the names, as in the checkpoint's metadata (`clip`), or as a spec
    if its file has moved. Default: the first that has one."""
    head: Literal["summary", "spatial"] | None = None
    """Which head of a student's adaptor leads its tokens into the texts' space: that of the summary, which
    learned from what texts are compared with, or that of the tokens. Default: summary; a teacher has none."""
    short_side: Pixels | None = None
    """Side in pixels that the shorter side of an image is resized to. Default: 448 with --data, 96 for the
    generated scenes; the crop's, where that is larger."""
    crop: Pixels | None = None
    """Side of the square crops in pixels, rounded to the nearest that the model takes. Default: the model's
    own size, or the short side where that is smaller."""
    stride: Pixels | None = None
    """Pixels from one crop to the next; the last one ends with the image. Default: half the crop."""
    background: Share | None = None
    """Label a pixel as background where no class has a probability of this or more (VOC's 21 classes,
    Context's 60); the model's name in the report then ends in -background. Default: the background's pixels
    are void, and it is no class (VOC's 20, Context's 59)."""
    temperature: Positive = 0.01
    """The probabilities that --background looks at are a softmax over cosines / temperature."""
    save_maps: Machine[CountOrZero] = 3
    """Number of validation images whose label maps and overlays are saved."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


def data_sets(settings: OpenVocabSettings, sets: DataSets) -> Mapping[str, OpenVocabSettings]:
    """Score on the data sets of label maps, unless data are named; a background is VOC's and Context's."""
    if settings.data is not None:
        return {OWN: settings}
    placed = {}
    if sets.ade20k is not None and settings.background is None and settings.layout in (None, "ade20k"):
        placed["ade20k"] = replace(settings, data=sets.ade20k)
    folders: dict[Layout, Path | None] = {"voc": sets.voc, "context": sets.context}
    if settings.background is None:
        folders["coco-stuff"] = sets.coco_stuff
    for layout, folder in folders.items():
        if folder is not None and settings.layout in (None, layout):
            placed[layout.replace("-", "_")] = replace(settings, data=folder, layout=layout)
    return placed


def suffix(settings: OpenVocabSettings) -> str:
    """Return what a layout and a background add to the model's name."""
    layout = "" if settings.layout is None else f"-{settings.layout}"
    return layout if settings.background is None else f"{layout}-background"


@evaluators.register("open-vocab")
def make() -> Evaluator[OpenVocabSettings]:
    """Segmentation by class names, through a CLIP teacher's text tower, in crops."""
    return Evaluator(
        name="open-vocab",
        settings=OpenVocabSettings,
        evaluate=late("evals.open_vocab.evaluator:evaluate"),
        title="open-vocabulary segmentation",
        input_size=late("evals.open_vocab.evaluator:crop_size"),
        missing_requirements=late("evals.open_vocab.evaluator:missing_requirements"),
        suffix=suffix,
        data_sets=data_sets,
    )

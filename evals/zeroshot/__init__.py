"""Zero-shot classification and retrieval through a CLIP teacher's text tower: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Scenes, ViewSettings, late
from radio.datasets import DataSets
from radio.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroshotSettings(ViewSettings):
    """Classification by class names, or retrieval by captions, with a CLIP teacher's text tower."""

    query: str | None = None
    """Labelled images: a folder with one folder per class, or tar shards. Default: the generated world."""
    scenes: Scenes = 1500
    """Number of images of the generated world."""
    class_names: str | None = None
    """`imagenet`, or a file with one name per line. Default: the names of the folders."""
    templates: str | None = None
    """`openai` (80), `simple` (7), `scenes` (8), or a file with one template per line, `{}` for the name.
    Default: `scenes` for the generated world, else `openai`."""
    text: str | None = None
    """The teacher whose text tower encodes the names, as in the checkpoint's metadata (`clip`), or as a spec
    if its file has moved. Default: the first that has one."""
    captions: str | None = None
    """Score image-text retrieval instead: a captions JSON in COCO's format, or `scenes`."""
    images: Path | None = None
    """The folder of the captions' images."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        ViewSettings.__post_init__(self)  # super() does not work in a class with slots
        named = self.class_names or self.templates or self.query
        if self.captions is not None and named:
            raise ConfigError(f"retrieval reads captions, not {named}; leave that or --captions out")
        if (self.images is None) != (self.captions in (None, "scenes")):
            raise ConfigError("--captions FILE and --images FOLDER belong together; give both")


def data_sets(settings: ZeroshotSettings, sets: DataSets) -> Mapping[str, ZeroshotSettings]:
    """Classify ImageNet's validation images by its 1000 names, unless images or captions are named."""
    if settings.query is not None or settings.captions is not None:
        return {OWN: settings}
    if sets.imagenet is None:
        return {}
    placed = replace(
        settings,
        query=str(sets.imagenet / "val"),
        class_names=settings.class_names or "imagenet",
        templates=settings.templates or "openai",
    )
    return {"imagenet": placed}


@evaluators.register("zeroshot")
def make() -> Evaluator[ZeroshotSettings]:
    """Classification by class names, and retrieval by captions, through a CLIP teacher's text tower."""
    return Evaluator(
        name="zeroshot",
        settings=ZeroshotSettings,
        evaluate=late("evals.zeroshot.evaluator:evaluate"),
        title="zero-shot",
        input_size=late("evals.core.features:view_size"),
        missing_requirements=late("evals.zeroshot.evaluator:missing_requirements"),
        suffix=lambda settings: "" if settings.captions is None else "-retrieval",
        data_sets=data_sets,
    )

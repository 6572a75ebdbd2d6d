"""What can be chosen about a zero-shot evaluation. Every field is a flag of `radio-eval zeroshot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evals.core.plan import ExtractionSettings, Scenes
from radio.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroshotSettings(ExtractionSettings):
    """Classification by class names, or retrieval by captions, with a CLIP teacher's text tower."""

    query: str | None = None
    """Labelled pictures: a folder with one folder a class, or tar shards. The generated world
    unless given."""
    scenes: Scenes = 1500
    """Pictures of the generated world, where no data are given."""
    class_names: str | None = None
    """`imagenet`, or a file with one name a line. What the folders are called unless given."""
    templates: str | None = None
    """`openai` (80), `simple` (7), `scenes` (8), or a file with one template a line, `{}` for the name.
    Those of the generated world there, else openai's, unless given."""
    text: str | None = None
    """The teacher whose text tower reads the names, as on the checkpoint's card (`clip`), or as a spec where
    its file has moved. The first that has one unless given."""
    captions: str | None = None
    """Score image-text retrieval instead: a captions JSON in COCO's format, or `scenes`."""
    images: Path | None = None
    """The folder of the captions' pictures."""

    def __post_init__(self) -> None:
        """Refuse what no data could make sense of."""
        ExtractionSettings.__post_init__(self)  # super() does not work in a class with slots
        named = self.class_names or self.templates or self.query
        if self.captions is not None and named:
            raise ConfigError(f"retrieval reads captions, not {named}; leave that or --captions out")
        if (self.images is None) != (self.captions in (None, "scenes")):
            raise ConfigError("--captions FILE and --images FOLDER belong together; give both")

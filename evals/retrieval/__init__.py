"""Retrieval of images of the same object by summaries: the task's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import Evaluator, Scenes, ViewKind, ViewSettings, late


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSettings(ViewSettings):
    """Retrieval of other images of the same object by the cosine of summaries."""

    data: Path | None = None
    """ROxford5k or RParis6k: the folder that has jpg/ and gnd_NAME.json. Default: the generated world."""
    scenes: tuple[Scenes, Annotated[int, Interval(ge=0, le=10_000_000)]] = (300, 600)
    """Numbers of objects and of distractors of the generated world. Each object is a query, and two other
    views of it are in the database."""
    view: ViewKind = "short-side"
    """A centre crop, or the whole image with its aspect ratio preserved."""


@evaluators.register("retrieval")
def make() -> Evaluator[RetrievalSettings]:
    """Retrieval of images of the same object: ROxford5k, RParis6k, or other views in the generated world."""
    return Evaluator(
        name="retrieval",
        settings=RetrievalSettings,
        evaluate=late("evals.retrieval.evaluator:evaluate"),
        title="instance retrieval",
        input_size=late("evals.core.features:view_size"),
    )

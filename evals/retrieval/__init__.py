"""Retrieval of images of the same object by summaries: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Scenes, ViewKind, ViewSettings, late
from radio.datasets import DataSets


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


def data_sets(settings: RetrievalSettings, sets: DataSets) -> Mapping[str, RetrievalSettings]:
    """Score on ROxford5k and RParis6k, unless data are named."""
    if settings.data is not None:
        return {OWN: settings}
    folders = {"roxford5k": sets.roxford5k, "rparis6k": sets.rparis6k}
    return {name: replace(settings, data=folder) for name, folder in folders.items() if folder is not None}


def suffix(settings: RetrievalSettings) -> str:
    """Return what the data add to the model's name: that of their ground truth, or else of their folder."""
    if settings.data is None:
        return ""
    truth = sorted(settings.data.glob("gnd_*.json"))
    name = truth[0].stem.removeprefix("gnd_") if len(truth) == 1 else settings.data.resolve().name
    return f"-{name}"


@evaluators.register("retrieval")
def make() -> Evaluator[RetrievalSettings]:
    """Retrieval of images of the same object: ROxford5k, RParis6k, or other views in the generated world."""
    return Evaluator(
        name="retrieval",
        settings=RetrievalSettings,
        evaluate=late("evals.retrieval.evaluator:evaluate"),
        title="instance retrieval",
        suffix=suffix,
        input_size=late("evals.core.features:view_size"),
        data_sets=data_sets,
    )

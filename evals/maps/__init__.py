"""Feature maps: the first three principal components of a model's tokens as red, green and blue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, late
from radio.config import check
from radio.datasets import DataSets


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsSettings:
    """Feature maps of a few images."""

    query: str | None = None
    """The images: a folder with one folder per class, or tar shards. Default: the generated world."""
    num_images: Annotated[int, Interval(ge=1, le=24)] = 6
    """Number of images, spread evenly."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


def data_sets(settings: MapsSettings, sets: DataSets) -> Mapping[str, MapsSettings]:
    """Draw ImageNet's validation images, unless images are named."""
    if settings.query is not None:
        return {OWN: settings}
    return {} if sets.imagenet is None else {"imagenet": replace(settings, query=str(sets.imagenet / "val"))}


@evaluators.register("maps")
def make() -> Evaluator[MapsSettings]:
    """The first three principal components of the tokens as colors, beside those of a student's teachers."""
    return Evaluator(
        name="maps",
        settings=MapsSettings,
        evaluate=late("evals.maps.evaluator:evaluate"),
        title="spatial features",
        data_sets=data_sets,
    )

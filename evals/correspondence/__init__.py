"""Correspondence of points on two images of an object by tokens: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Scenes, late
from radio.config import Count, Pixels, check
from radio.datasets import DataSets

if TYPE_CHECKING:
    from radio.types import Backbone

SPAIR_SIZE = 800
"""Side of the images in pixels, as in Probe3D (M. El Banani et al. 2024)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrespondenceSettings:
    """Points of an object that are found again in another image by the cosine of tokens."""

    data: Path | None = None
    """SPair-71k: the folder that has PairAnnotation/test/ and JPEGImages/. Default: the generated world."""
    scenes: Scenes = 300
    """Number of objects of the generated world, each in two views."""
    pairs_per_class: Count = 200
    """Maximum number of pairs of each class of SPair-71k, and of each class and difference of view, spread
    evenly."""
    size: Pixels | None = None
    """Side in pixels of the square that an image is resized to. Default: 800 px on SPair-71k, the model's own
    in the generated world."""
    upsample: Annotated[int, Interval(ge=1, le=8)] | None = None
    """Factor by which the map that is searched is up-sampled bilinearly. Default: 1 on SPair-71k, as in
    Probe3D; 4 in the generated world, whose maps are coarse."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


def input_size(model: Backbone, settings: CorrespondenceSettings) -> tuple[int, int]:
    """Return the size (height, width) in pixels of the images that a model gets."""
    own = model.native_size if settings.data is None else (SPAIR_SIZE, SPAIR_SIZE)
    return model.nearest_size(*(own if settings.size is None else (settings.size, settings.size)))


def data_sets(settings: CorrespondenceSettings, sets: DataSets) -> Mapping[str, CorrespondenceSettings]:
    """Score on SPair-71k, unless data are named."""
    if settings.data is not None:
        return {OWN: settings}
    return {} if sets.spair is None else {"spair": replace(settings, data=sets.spair)}


@evaluators.register("correspondence")
def make() -> Evaluator[CorrespondenceSettings]:
    """Points of an object found in another image of it: SPair-71k, or other views in the generated world."""
    return Evaluator(
        name="correspondence",
        settings=CorrespondenceSettings,
        evaluate=late("evals.correspondence.evaluator:evaluate"),
        title="correspondence",
        input_size=input_size,
        data_sets=data_sets,
    )

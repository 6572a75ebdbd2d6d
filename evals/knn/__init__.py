"""k-NN classification of frozen summaries: the task's settings. `evals.knn.index` has it as a function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Scenes, ViewSettings, late
from radio.config import Count, Positive
from radio.datasets import DataSets
from radio.errors import ConfigError

Neighbourhood = Annotated[int, Interval(ge=1, le=16_384)]
"""Number of neighbours that vote; those of a query are in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnSettings(ViewSettings):
    """Weighted k-nearest-neighbour classification of frozen summaries."""

    bank: str | None = None
    """Labelled images that provide the neighbours: a folder with one folder per class, or tar shards.
    Default: the generated world."""
    query: str | None = None
    """Labelled images to classify. Default: the generated world."""
    leave_one_out: bool = False
    """Classify the bank's own images, each without itself, instead of a query set."""
    scenes: tuple[Scenes, Scenes] = (6000, 1500)
    """Numbers of bank and query images of the generated world."""
    k: tuple[Neighbourhood, ...] = (10, 20, 100, 200)
    """Numbers of neighbours, scored from one search."""
    primary_k: Neighbourhood | None = None
    """The k whose scores are called top1, top5 and mean_class. Default: 20 if it is among k, else the
    first."""
    temperature: Positive = 0.07
    """A neighbour of similarity s votes exp(s / temperature)."""
    few_shot: tuple[Count, ...] = ()
    """Also score banks with these numbers of images per class."""
    tries: Annotated[int, Interval(ge=0, le=1000)] = 5
    """Random banks for each few-shot count; the seeds count from 0."""
    head: str | None = None
    """Score the summary in this teacher's space, through the student's adaptor."""
    real_labels: Path | None = None
    """Also score against a JSON list of accepted classes per query image (ImageNet-ReaL's layout)."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k = {self.k}: give one or more numbers of neighbours, each 1 or more")
        if self.primary_k is not None and self.primary_k not in self.k:
            raise ConfigError(f"primary_k = {self.primary_k} is not among k = {self.k}; add it there")
        if self.few_shot and (min(self.few_shot) < 1 or self.tries < 1):
            raise ConfigError(
                f"few_shot = {self.few_shot} with {self.tries} tries: give numbers of 1 or more"
            )
        if self.leave_one_out and self.query is not None:
            raise ConfigError("leave_one_out classifies the bank itself; leave the query out")
        if self.bank is None and self.query is not None:
            raise ConfigError("a query without a bank has no neighbours; give --bank too")
        if self.bank is not None and self.query is None and not self.leave_one_out:
            raise ConfigError("a bank without a query: give --query, or --leave-one-out")
        ViewSettings.__post_init__(self)  # super() does not work in a class with slots

    @property
    def main_k(self) -> int:
        """The k whose metrics have no suffix."""
        if self.primary_k is not None:
            return self.primary_k
        return 20 if 20 in self.k else self.k[0]


def data_sets(settings: KnnSettings, sets: DataSets) -> Mapping[str, KnnSettings]:
    """Classify ImageNet's validation images by the training images, unless a bank is named."""
    if settings.bank is not None:
        return {OWN: settings}
    if sets.imagenet is None:
        return {}
    query = None if settings.leave_one_out else str(sets.imagenet / "val")
    return {"imagenet": replace(settings, bank=str(sets.imagenet / "train"), query=query)}


@evaluators.register("knn")
def make() -> Evaluator[KnnSettings]:
    """Weighted k-nearest-neighbour classification of frozen summaries."""
    return Evaluator(
        name="knn",
        settings=KnnSettings,
        evaluate=late("evals.knn.evaluator:evaluate"),
        title="k-NN",
        input_size=late("evals.core.features:view_size"),
        suffix=lambda settings: f"-{settings.head}-head" if settings.head else "",
        data_sets=data_sets,
    )

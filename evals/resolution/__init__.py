"""How a model's scores depend on the size of its input: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, late, make_evaluator
from evals.knn import KnnSettings
from evals.zeroshot import ZeroshotSettings
from radio.config import Pixels, check
from radio.datasets import DataSets
from radio.errors import ConfigError

Task = Literal["knn", "zeroshot"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionSettings:
    """Scores of summaries over the side of the input."""

    sides: tuple[Pixels, ...] | None = None
    """Sides of the input in pixels, each rounded to the nearest that the model takes. Default: 2/3, 1, 3/2, 2
    and 3 times the model's own."""
    tasks: tuple[Task, ...] | None = None
    """Tasks to score. Default: those whose requirements the model meets."""
    knn: KnnSettings = field(default_factory=KnnSettings)
    zeroshot: ZeroshotSettings = field(default_factory=ZeroshotSettings)

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        check(self)
        if self.sides is not None and len(set(self.sides)) < 2:
            raise ConfigError(f"--sides {self.sides}: a curve needs two or more different sides")
        if self.tasks == ():
            raise ConfigError("--tasks names no task; give knn, zeroshot or both, or leave it out")
        for name, settings in self.of_tasks().items():
            if settings.size is not None:
                raise ConfigError(f"--{name}.size {settings.size}: --sides names the sizes; leave it out")

    def of_tasks(self) -> dict[Task, KnnSettings | ZeroshotSettings]:
        """Return the settings of every task that may be scored."""
        return {"knn": self.knn, "zeroshot": self.zeroshot}


def data_sets(settings: ResolutionSettings, sets: DataSets) -> Mapping[str, ResolutionSettings]:
    """Score each task on the data set that it would be scored on alone; none, where one of them has none."""
    name = OWN
    for task, own in settings.of_tasks().items():
        if settings.tasks is None or task in settings.tasks:
            placed = make_evaluator(task).data_sets(own, sets)
            if not placed:
                return {}
            [(data_set, chosen)] = placed.items()
            settings, name = replace(settings, **{task: chosen}), name or data_set
    return {name: settings}


@evaluators.register("resolution")
def make() -> Evaluator[ResolutionSettings]:
    """k-NN and zero-shot over the side of the input, and how much of the best score the worst side keeps."""
    return Evaluator(
        name="resolution",
        settings=ResolutionSettings,
        evaluate=late("evals.resolution.evaluator:evaluate"),
        title="resolution",
        expensive=True,
        missing_requirements=late("evals.resolution.evaluator:missing_requirements"),
        data_sets=data_sets,
    )

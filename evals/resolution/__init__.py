"""How a model's scores depend on the size of its input: the task's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from evals.core import evaluators
from evals.core.task import OWN, Compared, Evaluator, late, make_evaluator
from evals.correspondence import CorrespondenceSettings
from evals.dense_knn import DenseKnnSettings
from evals.depth import DepthSettings
from evals.knn import KnnSettings
from evals.linear import LinearSettings
from evals.open_vocab import OpenVocabSettings
from evals.retrieval import RetrievalSettings
from evals.seg_probe.protocol import SegSettings
from evals.zeroshot import ZeroshotSettings
from radio.config import Pixels, check
from radio.datasets import DataSets
from radio.errors import ConfigError

Task = Literal[
    "knn", "zeroshot", "linear", "retrieval", "dense-knn", "correspondence", "depth", "open-vocab", "seg"
]
TaskSettings = (
    KnnSettings
    | ZeroshotSettings
    | LinearSettings
    | RetrievalSettings
    | DenseKnnSettings
    | CorrespondenceSettings
    | DepthSettings
    | OpenVocabSettings
    | SegSettings
)

_SIDES: Mapping[Task, tuple[str, ...]] = {"open-vocab": ("crop", "short_side"), "seg": ("crop",)}
"""The settings that are the side of the input, where that is not `size`."""

_DEFAULT: tuple[Task, ...] = ("knn", "zeroshot")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionSettings:
    """Scores of summaries or tokens over the side of the input."""

    sides: Compared[tuple[Pixels, ...] | None] = None
    """Sides of the input in pixels, each rounded to the nearest that the model takes. Default: 2/3, 1, 3/2, 2
    and 3 times the model's own."""
    tasks: Compared[tuple[Task, ...] | None] = None
    """Tasks to score. Default: knn and zeroshot, where the model meets their requirements."""
    knn: KnnSettings = field(default_factory=KnnSettings)
    zeroshot: ZeroshotSettings = field(default_factory=ZeroshotSettings)
    linear: LinearSettings = field(default_factory=LinearSettings)
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    dense_knn: DenseKnnSettings = field(default_factory=DenseKnnSettings)
    correspondence: CorrespondenceSettings = field(default_factory=CorrespondenceSettings)
    depth: DepthSettings = field(default_factory=DepthSettings)
    open_vocab: OpenVocabSettings = field(default_factory=OpenVocabSettings)
    seg: SegSettings = field(default_factory=SegSettings)

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        check(self)
        if self.sides is not None and len(set(self.sides)) < 2:
            raise ConfigError(f"--sides {self.sides}: a curve needs two or more different sides")
        if self.tasks == ():
            raise ConfigError("--tasks names no task; give one or more, such as knn, or leave it out")
        for name, settings in self.of_tasks().items():
            for side in sides_of(name):
                if (given := getattr(settings, side)) is not None:
                    option = f"--{name}.{side.replace('_', '-')}"
                    raise ConfigError(f"{option} {given}: --sides names the sizes; leave it out")

    @property
    def chosen_tasks(self) -> tuple[Task, ...]:
        """The tasks to score, each once, whether or not a model meets their requirements."""
        return tuple(dict.fromkeys(_DEFAULT if self.tasks is None else self.tasks))

    def of_tasks(self) -> dict[Task, TaskSettings]:
        """Return the settings of every task that may be scored."""
        names: tuple[Task, ...] = get_args(Task)
        return {name: getattr(self, name.replace("-", "_")) for name in names}


def sides_of(task: Task) -> tuple[str, ...]:
    """Return the names of a task's settings that are the side of the input."""
    return _SIDES.get(task, ("size",))


def data_sets(settings: ResolutionSettings, sets: DataSets) -> Mapping[str, ResolutionSettings]:
    """Score each task on the data sets that it would be scored on alone; none, where one of them has none.

    There are as many reports as the task with most data sets has; others stay at their last.
    """
    own = settings.of_tasks()
    placed = {task: make_evaluator(task).data_sets(own[task], sets) for task in settings.chosen_tasks}
    most = max(placed.values(), key=lambda each: (len(each), OWN not in each))
    if not all(placed.values()):
        return {}
    reports = {}
    for number, name in enumerate(most):
        chosen = {task: list(each.values())[min(number, len(each) - 1)] for task, each in placed.items()}
        reports[name] = replace(settings, **{task.replace("-", "_"): each for task, each in chosen.items()})
    return reports


def suffix(settings: ResolutionSettings) -> str:
    """Return what the tasks add to the model's name, each once."""
    own = settings.of_tasks()
    return "".join(dict.fromkeys(make_evaluator(task).suffix(own[task]) for task in settings.chosen_tasks))


@evaluators.register("resolution")
def make() -> Evaluator[ResolutionSettings]:
    """Scores of other tasks over the side of the input, and how much of the best the worst side keeps."""
    return Evaluator(
        name="resolution",
        settings=ResolutionSettings,
        evaluate=late("evals.resolution.evaluator:evaluate"),
        title="resolution",
        suffix=suffix,
        expensive=True,
        missing_requirements=late("evals.resolution.evaluator:missing_requirements"),
        data_sets=data_sets,
    )

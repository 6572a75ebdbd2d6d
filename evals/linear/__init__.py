"""Linear classification of frozen summaries: the task's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple, get_args

from annotated_types import Interval

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, Machine, RunSettings, Scenes, ViewSettings, late
from radio.config import Count, Positive, Seed
from radio.datasets import DataSets
from radio.errors import ConfigError

Domain = Literal["night", "web", "mixture"]
"""A domain of the generated world that is not the training images' own."""

Strength = Annotated[float, Interval(ge=1e-12, le=1e12)]
"""A value of C; beyond, the penalty or its gradient vanishes in float64."""

_TAKEN = {"train", "val", *get_args(Domain)}
_NAME = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)
_OF_SOLVER = {
    "logreg": ("c", "max_iterations", "tolerance", "fit_precision"),
    "sgd": ("lr", "iterations", "train_batch_size"),
}


class Split(NamedTuple):
    """A data set to train on and to be scored on."""

    train: str
    val: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings(ViewSettings):
    """Linear classification of frozen summaries, on one data set or several, and its calibration."""

    train: tuple[str, ...] = ()
    """Labelled images to train on: a folder with one folder per class, or tar shards; of several data sets
    NAME=FOLDER each. Default: the generated world."""
    val: tuple[str, ...] = ()
    """Labelled images to score: one for each of --train, by the same names. Default: the generated world."""
    also: tuple[str, ...] = ()
    """NAME=FOLDER: other images that the same head is scored on, all or some of whose classes it knows, by
    their names or by ImageNet's ids and numbers: ImageNet-V2, -R, -A, -Sketch."""
    scenes: tuple[Scenes, Scenes, Scenes] = (1500, 1500, 500)
    """Numbers of training images and scored images of the generated world, and of the latter in each
    domain."""
    domains: tuple[Domain, ...] | None = None
    """Domains of the generated world in which the same head is scored on the same scenes again. Default:
    night and web where the scored images are of that world."""
    solver: Literal["logreg", "sgd"] = "logreg"
    """logreg: logistic regression by L-BFGS over the strengths of its penalty; sgd: DINOv2's grid of learning
    rates, on the summary and on the summary with the mean of the tokens."""
    choose: Literal["held-out", "scored"] | None = None
    """Choose the penalty or learning rate on every tenth training image (then all are trained on), or on the
    scored images, as DINOv2's linear evaluation does. Default: held-out for logreg, scored for sgd."""
    c: tuple[Strength, ...] | None = None
    """logreg: values of C, the inverse strength of the penalty, as scikit-learn has it. Default: DINOv2's 45
    from 1e-6 to 1e5."""
    max_iterations: Count | None = None
    """logreg: most iterations for each C. Default: 1000."""
    tolerance: Positive | None = None
    """logreg: a fit ends where the mean loss falls by less in an iteration. Default: 1e-12."""
    fit_precision: Literal["fp32", "fp64"] | None = None
    """logreg: precision of the fit. Default: fp64."""
    lr: tuple[Positive, ...] | None = None
    """sgd: learning rates for a batch of 256, scaled to the batch. Default: DINOv2's 13 from 1e-5 to 0.1."""
    iterations: Count | None = None
    """sgd: steps of the optimizer. Default: 12,500, and 300 for the generated world."""
    train_batch_size: Annotated[int, Interval(ge=1, le=65_536)] | None = None
    """sgd: images per step. Default: 1024, and 256 for the generated world."""
    head_seed: Machine[Seed | None] = None
    """Seed of the held-out images, and of sgd's first weights and batches. Default: --seed."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        ViewSettings.__post_init__(self)  # super() does not work in a class with slots
        own = _OF_SOLVER[self.solver]
        for name in (name for names in _OF_SOLVER.values() for name in names if names != own):
            if getattr(self, name) is not None:
                other = "sgd" if self.solver == "logreg" else "logreg"
                raise ConfigError(f"--{name.replace('_', '-')} is of --solver {other}; leave one of them out")
        for name, values in (("c", self.c), ("lr", self.lr)):
            if values is not None and len(set(values)) < max(len(values), 1):
                raise ConfigError(f"--{name} {' '.join(map(str, values))}: give one or more different values")
        if self.scenes[2] > self.scenes[1]:
            raise ConfigError(
                f"scenes = {self.scenes}: the third are some of the second in each domain; give fewer"
            )
        splits, also = self.splits, self.also_by_name
        if also and len(splits) > 1:
            raise ConfigError("--also is scored with one head; give one --train, or leave --also out")
        if self.domains and not self.is_generated:
            raise ConfigError("--domains are of the generated world; leave them out, or --train and --val")
        if taken := set(also) & _TAKEN:
            raise ConfigError(
                f"--also {min(taken)}=…: the report's own names are {', '.join(sorted(_TAKEN))}; give another"
            )

    @property
    def splits(self) -> dict[str, Split]:
        """The data sets by name; a single one may have none.

        Raises:
            ConfigError: --train and --val do not name the same ones.
        """
        if not self.train and not self.val:
            return {"": Split("scenes:train", "scenes:val")}
        train, val = _by_name("--train", self.train), _by_name("--val", self.val)
        if train.keys() != val.keys():
            raise ConfigError(
                f"--train has {_names(train)} and --val {_names(val)}; give both for every data set, as "
                f"NAME=FOLDER with the same names where there are several"
            )
        return {name: Split(train[name], val[name]) for name in train}

    @property
    def also_by_name(self) -> dict[str, str]:
        """The other sets to score, by name."""
        also = _by_name("--also", self.also)
        if "" in also:
            raise ConfigError(f"--also {also['']}: wanted NAME=FOLDER, such as v2={also['']}")
        return also

    @property
    def is_generated(self) -> bool:
        """Whether the scored images are of the generated world alone."""
        return all(split.val.startswith("scenes:") for split in self.splits.values())

    @property
    def chosen_domains(self) -> tuple[Domain, ...]:
        """The domains to score."""
        if self.domains is not None:
            return tuple(dict.fromkeys(self.domains))
        return ("night", "web") if self.is_generated and len(self.splits) == 1 else ()

    @property
    def chooses_on(self) -> Literal["held-out", "scored"]:
        """The images on which the penalty or the learning rate is chosen."""
        return self.choose or ("held-out" if self.solver == "logreg" else "scored")


def _by_name(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """Split NAME=FOLDER; a single text may be a folder alone, under the name ""."""
    pairs = [(match[1], match[2]) if (match := _NAME.fullmatch(text)) else ("", text) for text in texts]
    named = dict(pairs)
    if len(named) < len(pairs) or ("" in named and len(named) > 1):
        raise ConfigError(
            f"{option} {' '.join(texts)}: several data sets need a name of their own each: NAME=FOLDER"
        )
    return named


def _names(named: Mapping[str, str]) -> str:
    return ", ".join(name or folder for name, folder in named.items()) or "none"


def data_sets(settings: LinearSettings, sets: DataSets) -> Mapping[str, LinearSettings]:
    """Classify ImageNet and the other sets of its classes that are there, unless data are named."""
    if settings.train or settings.val:
        return {OWN: settings}
    if sets.imagenet is None:
        return {}
    train, val = ((str(sets.imagenet / split),) for split in ("train", "val"))
    others = {
        "v2": sets.imagenet_v2,
        "r": sets.imagenet_r,
        "a": sets.imagenet_a,
        "sketch": sets.imagenet_sketch,
    }
    there = tuple(f"{name}={folder}" for name, folder in others.items() if folder is not None)
    return {"imagenet": replace(settings, train=train, val=val, also=settings.also or there)}


def with_seed(settings: LinearSettings, run: RunSettings, number: int) -> LinearSettings:
    """Return the settings of the `number`-th repetition, with another seed of what is drawn."""
    first = run.seed if settings.head_seed is None else settings.head_seed
    return replace(settings, head_seed=first + number)


@evaluators.register("linear")
def make() -> Evaluator[LinearSettings]:
    """Linear classification of frozen summaries, also under distribution shift, and its calibration."""
    return Evaluator(
        name="linear",
        settings=LinearSettings,
        evaluate=late("evals.linear.evaluator:evaluate"),
        title="linear classification",
        input_size=late("evals.core.features:view_size"),
        suffix=lambda settings: "-sgd" if settings.solver == "sgd" else "",
        with_seed=with_seed,
        data_sets=data_sets,
    )

"""What a task declares: its settings, and an `Evaluator` of its functions.

The commands print its options without torch: this module and every module that declares a task need none, and
name the functions that do by `late`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, final

from annotated_types import Interval

from radio.config import AttentionWindow, CountOrZero, Pixels, Seed, Workers, check, from_plain
from radio.datasets import SET_NAMES, DataSets, read_data_sets
from radio.errors import ConfigError, shown

from . import evaluators

if TYPE_CHECKING:
    from radio.types import Backbone

    from .evaluator import EvalRun, Result

S = TypeVar("S")
V = TypeVar("V")

Machine = Annotated[V, "machine"]
"""The type of a setting that may differ between compared reports: `workers: Machine[int] = 2`.
It concerns how the work is done (or its seed), and is no part of the protocol."""

Compared = Annotated[V, "compared"]
"""The type of a setting whose default depends on the model and is part of the protocol all the same:
`sides: Compared[tuple[int, ...] | None] = None`. Of compared reports its `resolved` values must be equal."""

ViewKind = Literal["center", "short-side"]

Scenes = Annotated[int, Interval(ge=1, le=10_000_000)]
"""Number of images of the generated world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Settings that every evaluator has."""

    limit: CountOrZero | None = None
    """Maximum number of images of each set, spread evenly. Default: all."""
    seed: Seed = 0
    """Seed of the generated world, of the bootstrap, and of what the evaluator trains."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model. On a GPU fp32 computes matrix products in TF32, unless NVIDIA_TF32_OVERRIDE=0
    is set."""
    batch_size: Machine[Annotated[int, Interval(ge=1, le=65_536)] | None] = None
    """Images per forward pass of the model; does not change the scores. Default: the task's."""
    workers: Machine[Workers | None] = None
    """Loader processes. Default: none on a CPU, up to 8 with a GPU."""
    cache: Machine[Path | None] = None
    """Folder of features, generated images and states. Default: $XDG_CACHE_HOME/am-radio, or
    ~/.cache/am-radio."""
    device: Machine[str] = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: Machine[Path | None] = None
    """A data.yaml that names your data sets, or a folder that has them: instead of the generated world, where
    a task's own options name no data."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSettings:
    """How an image becomes the model's input; evaluators of summaries inherit it."""

    view: ViewKind = "center"
    """A centre crop, or the whole image with its aspect ratio preserved."""
    size: Pixels | None = None
    """Side of the crop, or the short side, in pixels. Default: the model's own size."""
    ratio: Annotated[float, Interval(ge=1, le=16)] = 256 / 224
    """Factor on the size that the image is resized to before the centre crop."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


@final
@dataclass(frozen=True, kw_only=True)
class Evaluator(Generic[S]):
    """One task: its settings, and the function that scores a backbone on it."""

    name: str  # on the command line, such as `knn`
    settings: type[S]  # a frozen dataclass; its fields become options
    evaluate: Callable[[Backbone, S, EvalRun], Result]
    title: str = ""  # for people (default: the name)
    expensive: bool = False  # minutes per model: a training run scores only its student
    on_request: bool = False  # left out of `radio-eval all` unless named
    missing_requirements: Callable[[Backbone], str] = lambda model: ""
    """Describes the requirements that a model does not meet; empty when it meets all."""
    suffix: Callable[[S], str] = lambda settings: ""
    """What these settings add to the model's name in the report, such as `-3-clicks`."""
    with_seed: Callable[[S, RunSettings, int], S] | None = None
    """For an evaluator that trains something: the settings of its repetition of that number."""
    score_predictions: Callable[[S, EvalRun], Result] | None = None
    """Scores stored predictions without a model, where `predictions_of` names a file."""
    predictions_of: Callable[[S], Path | None] = lambda settings: None
    input_size: Callable[[Backbone, S], tuple[int, int]] | None = None
    """The size (height, width) in pixels of the images that a backbone gets; None: it depends on the data."""
    data_sets: Callable[[S, DataSets], Mapping[str, S]] = lambda settings, sets: {}
    """These settings on each of a user's data sets that the task has a protocol for, by the set's name; under
    `OWN` where they name their data themselves or need none: as they are, but for what they do not name."""


OWN = ""
"""Stands for the data that a task's settings name themselves, in place of a data set's name."""


def settings_on(evaluator: Evaluator[S], settings: S, sets: DataSets) -> dict[str, S]:
    """Return a task's settings on each data set that it has a protocol for and that is there, by its name.

    Settings that name their own data, or need none, come back under `OWN`. Empty where none of the
    task's data sets is there: the generated world does not stand in for them.

    Raises:
        ConfigError: the evaluator gives settings of another type, or on a data set that does not exist.
    """
    placed: Any = evaluator.data_sets(settings, sets)
    known = {OWN, *(field.name for field in fields(DataSets))}
    if (
        not isinstance(placed, Mapping)
        or not set(placed) <= known
        or not all(isinstance(each, evaluator.settings) for each in placed.values())
    ):
        who = evaluators.plugin(evaluator.name) or evaluator.name
        raise ConfigError(
            f"{who}: its data_sets gave no mapping from names of data sets to {evaluator.settings.__name__}; "
            f"mend or uninstall the package that brings it"
        )
    return dict(placed)


def name_job(task: str, data_set: str) -> str:
    """Return the name of a task on one of its data sets, such as `seg on voc`."""
    return task if data_set == OWN else f"{task} on {data_set.replace('_', '-')}"


def task_of(job: str) -> str:
    """Return the task that a name of `name_job` begins with; other names are a task's."""
    task, _, data_set = job.rpartition(" on ")
    return task if data_set in SET_NAMES else job


def missing_data(evaluator: Evaluator[S], settings: S, root: Path) -> str:
    """Describe why `settings_on` is empty for a data root: the data sets that it lacks.

    Raises:
        RadioError: as `read_data_sets` and `settings_on` say.
    """
    sets = read_data_sets(root)
    names = [field.name for field in fields(DataSets)]
    absent = [name for name in names if getattr(sets, name) is None]
    present = set(names) - set(absent)

    def suffice(added: set[str]) -> bool:
        everything = from_plain(DataSets, {name: name for name in names if name in present | added})
        return bool(settings_on(evaluator, settings, everything))

    needed = set(absent)
    for name in absent:
        if suffice(needed - {name}):
            needed.remove(name)
    if not needed or not suffice(needed):
        return "it has no protocol for the data sets of --data-root; name its data by its own options"
    lacks = [
        " or ".join(other.replace("_", "-") for other in absent if suffice(needed - {name} | {other}))
        for name in absent
        if name in needed
    ]
    return f"{shown(root)} has not {', nor '.join(lacks)}, which it is scored on; name it there"


def late(function: str) -> Callable[..., Any]:
    """Return a function that imports `module:function` when it is called, and calls it."""
    return lambda *given: resolve_name(function)(*given)


def make_evaluator(task: str) -> Evaluator[Any]:
    """Create the evaluator of a task and validate its settings.

    Raises:
        ConfigError: the task is unknown, or the object that another package registered is no evaluator.
    """
    factory: Any = evaluators[task]
    made: Any = factory() if callable(factory) else factory
    if not callable(factory):
        problem = f"its entry point is a {type(factory).__name__}, wanted a function that makes an Evaluator"
    elif not isinstance(made, Evaluator):
        problem = f"its factory gave a {type(made).__name__}, wanted an evals.core.evaluator.Evaluator"
    elif made.name != task:
        problem = f"it calls itself {made.name!r}; give the evaluator the name of its entry point"
    elif not is_dataclass(made.settings):
        problem = "its settings are no dataclass"
    elif taken := {f.name for f in fields(made.settings)} & {f.name for f in fields(RunSettings)}:
        problem = f"its setting {min(taken)} is one that every evaluator has; use `run`, or call it otherwise"
    else:
        return made
    who = evaluators.plugin(task) or task
    raise ConfigError(f"{who}: {problem}; mend or uninstall the package that brings it")


def windowed_name(name: str, window: AttentionWindow | None) -> str:
    """Return the name under which a model with a chosen window is reported."""
    if window is None:
        return name
    return f"{name}-window-global" if window == "global" else f"{name}-window{window}"

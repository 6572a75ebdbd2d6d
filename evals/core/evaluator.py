"""What an evaluator is, the names they go by, and what is true of all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints, runtime_checkable

import torch

from radio.errors import ConfigError
from radio.registry import Registry
from radio.types import Backbone

from .report import Report

S = TypeVar("S")
V = TypeVar("V")
T = TypeVar("T", contravariant=True)

Advance = Callable[[int], None]
"""Tells a progress bar that so many more pictures are done."""


Machine = Annotated[V, "machine"]
"""The type of a setting that may differ between two reports which are compared: `workers: Machine[int] = 2`.
It says how the work is done (or which luck it has), and is no part of the protocol."""


def machine_settings(settings: Any) -> tuple[str, ...]:
    """Name the settings of a task that are no part of its protocol, for its report."""
    hints = get_type_hints(type(settings), include_extras=True)
    return tuple(name for name, hint in hints.items() if "machine" in getattr(hint, "__metadata__", ()))


class Watch(Protocol):
    """Shows the progress of a long job; the command line gives one that draws a bar."""

    def __call__(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """A context in which `total` steps are reported, piece by piece."""


def silent(label: str, total: int) -> AbstractContextManager[Advance]:
    """A watch that shows nothing."""
    return nullcontext(_ignore)


class Evaluator(Protocol[S]):
    """Scores any backbone on one task."""

    @property
    def name(self) -> str:
        """The task, as on the command line: `knn`."""

    @property
    def settings(self) -> type[S]:
        """A frozen dataclass with a default everywhere: it becomes flags and goes into the report."""

    def run(self, model: Backbone, settings: S, out: Path, *, name: str, watch: Watch) -> Report:
        """Score `model`, write the report (and what belongs to it) into the folder `out`, and return it.

        Args:
            name: what the report and its files call the model.
        """


@runtime_checkable
class ScoringFiles(Protocol[T]):
    """An evaluator that can score what a model said earlier, without the model."""

    def run_without_model(self, settings: T, out: Path) -> Report | None:
        """The report, written into the folder `out`; None where the settings ask for a model."""


EvaluatorFactory = Callable[[], Evaluator[Any]]

evaluators: Registry[EvaluatorFactory] = Registry("evaluator")
"""Factories, so that a listing imports no optional library. Plug-ins use the entry-point group
`am_radio.evaluators`; the first line of a factory's docstring is what `radio-eval list` prints."""


def make_evaluator(task: str) -> Evaluator[Any]:
    """The evaluator of a task, once it is seen to be one.

    Raises:
        ConfigError: there is no such task, or what another package brings for it is no evaluator.
    """
    made: Any = evaluators[task]()
    settings = getattr(made, "settings", None)
    parts = [getattr(made, part, None) for part in ("name", "run")]
    if not (isinstance(settings, type) and is_dataclass(settings) and all(parts)):
        raise ConfigError(
            f"{evaluators.plugin(task) or task}: its settings are no dataclass, or it has no name or run; "
            f"mend or uninstall the package that brings it"
        )
    evaluator: Evaluator[Any] = made
    return evaluator


def run_one(
    evaluator: Evaluator[S], model: Backbone, settings: S, out: Path, *, name: str, watch: Watch
) -> Report:
    """The evaluator's report of a model, once it is seen to be one.

    Raises:
        ConfigError: it is none, or has no metric of its headline.
    """
    report: Any = evaluator.run(model, settings, out, name=name, watch=watch)
    if not isinstance(report, Report):
        raise ConfigError(f"{evaluator.name}: its run gave a {type(report).__name__}, wanted a Report")
    if report.headline not in report.metrics:
        raise ConfigError(f"{evaluator.name}: its report has no metric {report.headline!r}, its headline")
    return report


@runtime_checkable
class Carded(Protocol):
    """A model that says what it was trained on."""

    @property
    def card(self) -> Mapping[str, Any]:
        """`card["data"]["sources"]` is a list of {"path", "fingerprint", "labels_used"}."""


def card_of(model: Backbone) -> dict[str, Any]:
    """What a checkpoint's card says; empty for a model without one."""
    return dict(model.card) if isinstance(model, Carded) else {}


def place(model: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The model on a device, in evaluation mode, computing in a type.

    In another type than float32 it is a copy: weights that were rounded in place would stay so, for the tasks
    that follow and for the fingerprint.
    """
    if dtype != torch.float32:
        model = copy.deepcopy(model)
    return model.to(device, dtype).eval()


class Placed(Protocol):
    """A data set that can be compared with what a model was trained on."""

    @property
    def name(self) -> str:
        """A short name for reports."""

    @property
    def location(self) -> str:
        """Where it lies: the resolved path or pattern, or `scenes:train?seed=0`."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content."""


def domain_notes(model: Backbone, sources: Iterable[Placed]) -> tuple[str, ...]:
    """Notes for a report on data that the model was trained on, or on its neighbours under one root."""
    if not isinstance(model, Carded):
        return ()
    trained_on = (model.card.get("data") or {}).get("sources") or ()
    notes = []
    for source in sources:
        for entry in trained_on:
            relation = _relation(source, entry)
            if relation:
                labels = "with" if entry.get("labels_used") else "without"
                notes.append(
                    f"in-domain: {source.name} {relation} {entry.get('path')}, "
                    f"which the model was trained on ({labels} labels)"
                )
                break
    return tuple(notes)


_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def _relation(source: Placed, entry: Mapping[str, Any]) -> str:
    if entry.get("fingerprint") == source.fingerprint:
        return "holds the same pictures as"
    path = str(entry.get("path") or "")
    if not path:
        return ""
    if path.startswith("scenes:") or source.location.startswith("scenes:"):
        both = path.startswith("scenes:") and source.location.startswith("scenes:")
        return "is drawn from the same generated world as" if both else ""
    ours, theirs = Path(source.location).resolve(), Path(path).resolve()
    if ours == theirs:
        return "is the same place as"
    if ours.is_relative_to(theirs) and theirs.is_dir():
        return "lies within"
    if theirs.is_relative_to(ours) and ours.is_dir():
        return "contains"
    if ours.parent == theirs.parent and ours.name in _SPLITS and theirs.name in _SPLITS:
        return "is a split of the same data set as"
    if ours.suffix == theirs.suffix == ".tar" and ours.parent == theirs.parent:
        return "lies beside"
    return ""


def _ignore(steps: int) -> None:
    """Nothing to show."""

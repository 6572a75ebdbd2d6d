"""The interface of evaluators, their registry, and helpers that all of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints, runtime_checkable

import torch

from radio.errors import ConfigError
from radio.progress import ProgressFactory
from radio.registry import Registry
from radio.types import Backbone

from .report import Report

S = TypeVar("S")
V = TypeVar("V")
T = TypeVar("T", contravariant=True)


Machine = Annotated[V, "machine"]
"""The type of a setting that may differ between compared reports: `workers: Machine[int] = 2`.
It concerns how the work is done (or its seed), and is no part of the protocol."""


def machine_settings(settings: Any) -> tuple[str, ...]:
    """Return the names of a task's settings that are no part of its protocol, for its report."""
    hints = get_type_hints(type(settings), include_extras=True)
    return tuple(name for name, hint in hints.items() if "machine" in getattr(hint, "__metadata__", ()))


class Evaluator(Protocol[S]):
    """Scores any backbone on one task."""

    @property
    def name(self) -> str:
        """Name of the task on the command line, such as `knn`."""

    @property
    def settings(self) -> type[S]:
        """Frozen dataclass with a default for every field; it becomes flags and is written to the report."""

    def run(self, model: Backbone, settings: S, out: Path, *, name: str, watch: ProgressFactory) -> Report:
        """Score `model`, write the report and its files into the folder `out`, and return it.

        Args:
            name: the model's name in the report and its files.
        """


@runtime_checkable
class ScoringFiles(Protocol[T]):
    """An evaluator that can score a model's stored answers without the model."""

    def run_without_model(self, settings: T, out: Path) -> Report | None:
        """Write the report into the folder `out` and return it; None when the settings require a model."""


EvaluatorFactory = Callable[[], Evaluator[Any]]

evaluators: Registry[EvaluatorFactory] = Registry("evaluator")
"""Factories, so that a listing imports no optional library. Plug-ins use the entry-point group
`am_radio.evaluators`; the first line of a factory's docstring is what `radio-eval list` prints."""


def make_evaluator(task: str) -> Evaluator[Any]:
    """Create the evaluator of a task and validate its interface.

    Raises:
        ConfigError: the task is unknown, or the object that another package registered is no evaluator.
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
    evaluator: Evaluator[S], model: Backbone, settings: S, out: Path, *, name: str, watch: ProgressFactory
) -> Report:
    """Run the evaluator on a model and validate its report.

    Raises:
        ConfigError: the result is no report, or lacks its primary metric.
    """
    report: Any = evaluator.run(model, settings, out, name=name, watch=watch)
    if not isinstance(report, Report):
        raise ConfigError(f"{evaluator.name}: its run gave a {type(report).__name__}, wanted a Report")
    if report.primary_metric not in report.metrics:
        raise ConfigError(
            f"{evaluator.name}: its report has no metric {report.primary_metric!r}, its primary metric"
        )
    return report


def place(model: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Move the model to a device and type, in evaluation mode.

    For types other than float32 this is a copy: weights rounded in place would stay so for later tasks and
    for the fingerprint.
    """
    if dtype != torch.float32:
        model = copy.deepcopy(model)
    return model.to(device, dtype).eval()


class Placed(Protocol):
    """A data set that can be compared with a model's training data."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    @property
    def location(self) -> str:
        """The resolved path or pattern, or `scenes:train?seed=0`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""


def domain_notes(model: Backbone, sources: Iterable[Placed]) -> tuple[str, ...]:
    """Return notes for a report on evaluation data that was, or lies beside, the model's training data."""
    trained_on = (model.metadata.get("data") or {}).get("sources") or ()
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
        return "holds the same images as"
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

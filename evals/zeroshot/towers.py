"""From a model to the text tower it can be read with, and the space in which both meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from evals.core.evaluator import Carded
from evals.core.plan import Adapting
from radio.errors import CheckpointError, ConfigError, RadioError, did_you_mean
from radio.hub import load_teacher
from radio.metadata import teachers_on
from radio.types import Backbone, Teacher, TextTower

_HAVE_ONE = (
    "scenes:clip, openclip:NAME@FILE, pip:efficientnet-lite0, or a student that learned from one of them"
)


class Side(NamedTuple):
    """The text side of a model."""

    teacher: str  # a spec, for reports
    tower: TextTower
    head: str | None  # the adaptor that leads into the teacher's space; None for the teacher itself


@runtime_checkable
class Speaking(Protocol):
    """A model that may have a text tower of its own."""

    @property
    def text(self) -> TextTower | None:
        """The text tower; None where there is none."""


def text_side(model: Backbone, wanted: str | None = None) -> Side:
    """The text tower of a teacher, or of the teacher that a student's card names, with the adaptor to it.

    Args:
        wanted: the teacher on the card to take, by its name there or as a spec (`openclip:NAME@FILE`, where
            the file has moved); the first with a text tower unless given.

    Raises:
        ConfigError: the model has no text tower, or the one wanted is not the one it learned from.
        CheckpointError: the teacher's weights are not where the card says.
    """
    if isinstance(model, Speaking):
        if model.text is None:
            raise ConfigError(f"{model.name} has no text tower; zero-shot needs {_HAVE_ONE}")
        if wanted is not None:
            raise ConfigError(f"{model.name} brings its own text tower; leave --text {wanted} out")
        return Side(model.name, model.text, None)
    entries = _teachers_on(model)
    if not entries or not isinstance(model, Adapting):
        raise ConfigError(
            f"{model.name} learned from no teacher, so it has no text tower; zero-shot needs {_HAVE_ONE}"
        )
    if wanted is not None and ":" in wanted:
        return _matching(model, entries, load_teacher(wanted), wanted)
    if wanted is not None:
        entries = [entry for entry in entries if entry["name"] == wanted] or _no_such(model, entries, wanted)
    for entry in entries:
        teacher = _load(model, entry)
        if teacher.text is not None:
            _check(model, entry, teacher)
            return Side(entry["model"], teacher.text, entry["name"])
    raise ConfigError(
        f"{model.name} learned from {', '.join(entry['model'] for entry in entries)}: none of them has a "
        f"text tower; zero-shot needs {_HAVE_ONE}"
    )


def _teachers_on(model: Backbone) -> list[Mapping[str, Any]]:
    return teachers_on(model.card, model.name) if isinstance(model, Carded) else []


def _no_such(model: Backbone, entries: list[Mapping[str, Any]], wanted: str) -> list[Mapping[str, Any]]:
    names = [entry["name"] for entry in entries]
    hint = did_you_mean(wanted, names) or f"; it has {', '.join(names)}"
    raise ConfigError(f"{model.name} has no teacher {wanted!r}{hint}")


def _load(model: Backbone, entry: Mapping[str, Any]) -> Teacher:
    try:
        return load_teacher(entry["model"])
    except RadioError as error:
        raise CheckpointError(
            f"{model.name} needs the text tower of {entry['model']}, which cannot be loaded: {error}; "
            f"if its file has moved, name it with --text FAMILY:NAME@FILE"
        ) from error


def _check(model: Backbone, entry: Mapping[str, Any], teacher: Teacher) -> None:
    if teacher.fingerprint != entry["fingerprint"]:
        raise ConfigError(
            f"{entry['model']} is not the one that {model.name} learned from: its weights or settings have "
            f"changed; name the right one with --text FAMILY:NAME@FILE"
        )


def _matching(model: Backbone, entries: list[Mapping[str, Any]], teacher: Teacher, wanted: str) -> Side:
    """The side of a teacher that was named by hand, if it is on the card."""
    if teacher.text is None:
        raise ConfigError(f"{wanted} has no text tower; zero-shot needs {_HAVE_ONE}")
    for entry in entries:
        if entry["fingerprint"] == teacher.fingerprint:
            return Side(wanted, teacher.text, entry["name"])
    raise ConfigError(
        f"{model.name} did not learn from {wanted} (none of its teachers has these weights and settings)"
    )

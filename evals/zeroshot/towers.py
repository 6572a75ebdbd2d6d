"""The text tower that matches a model, and the adaptor into its space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from radio.errors import CheckpointError, ConfigError, RadioError, did_you_mean
from radio.hub import load_teacher
from radio.metadata import teachers_on
from radio.types import Backbone, Teacher, TextTower

_HAVE_ONE = (
    "scenes:clip, openclip:NAME@FILE, pip:efficientnet-lite0, or a student that learned from one of them"
)


class TextHead(NamedTuple):
    """Text tower of a model, and the adaptor that leads to it."""

    teacher: str  # a spec, for reports
    tower: TextTower
    head: str | None  # the adaptor that leads into the teacher's space; None for the teacher itself


def find_text_tower(model: Backbone, wanted: str | None = None) -> TextHead:
    """Find the text tower of a teacher, or of one of a student's teachers with the adaptor to it.

    Args:
        wanted: a teacher in the student's metadata, by its name there or as a spec (`openclip:NAME@FILE`, if
            the file has moved); default: the first with a text tower.

    Raises:
        ConfigError: the model has no text tower, or was not trained on the requested teacher.
        CheckpointError: the teacher's weights are not at the path in the metadata.
    """
    if model.text is not None:
        if wanted is not None:
            raise ConfigError(f"{model.name} brings its own text tower; leave --text {wanted} out")
        return TextHead(model.name, model.text, None)
    entries = teachers_on(model.metadata, model.name)
    if not entries:
        raise ConfigError(
            f"{model.name} has no text tower and learned from no teacher; zero-shot needs {_HAVE_ONE}"
        )
    if wanted is not None and ":" in wanted:
        return _matching(model, entries, load_teacher(wanted), wanted)
    if wanted is not None:
        entries = [entry for entry in entries if entry["name"] == wanted] or _no_such(model, entries, wanted)
    for entry in entries:
        teacher = _load(model, entry)
        if teacher.text is not None:
            _check(model, entry, teacher)
            return TextHead(entry["model"], teacher.text, entry["name"])
    raise ConfigError(
        f"{model.name} learned from {', '.join(entry['model'] for entry in entries)}: none of them has a "
        f"text tower; zero-shot needs {_HAVE_ONE}"
    )


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


def _matching(model: Backbone, entries: list[Mapping[str, Any]], teacher: Teacher, wanted: str) -> TextHead:
    """Return the text head of an explicitly named teacher after checking that the metadata has it."""
    if teacher.text is None:
        raise ConfigError(f"{wanted} has no text tower; zero-shot needs {_HAVE_ONE}")
    for entry in entries:
        if entry["fingerprint"] == teacher.fingerprint:
            return TextHead(wanted, teacher.text, entry["name"])
    raise ConfigError(
        f"{model.name} did not learn from {wanted} (none of its teachers has these weights and settings)"
    )

"""Text towers, and the unit vectors of texts and of classes, cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from evals.core.features import to_unit
from radio.checkpoint import teachers_on
from radio.chunks import (
    Damage,
    TensorSpec,
    check_all_there,
    find_missing,
    read_tensors,
    write_tensors,
)
from radio.dist import Group
from radio.errors import CheckpointError, ConfigError, RadioError, did_you_mean, require
from radio.hub import load_teacher
from radio.progress import Advance, ProgressFactory, no_progress
from radio.types import Backbone, Teacher, TextTower

_HAVE_ONE = (
    "scenes:clip, openclip:NAME@FILE, pip:efficientnet-lite0, or a student that learned from one of them"
)


class TextHead(NamedTuple):
    """Text tower of a model, and the adaptor that leads to it."""

    teacher: str  # a spec, for reports
    tower: TextTower
    head: str | None  # the adaptor that leads into the teacher's space; None for the teacher itself


def find_text_tower(model: Backbone, spec: str | None = None) -> TextHead:
    """Find the text tower of a teacher, or of one of a student's teachers with the adaptor to it.

    Args:
        spec: a teacher in the student's metadata, by its name there or as a spec (`openclip:NAME@FILE`, if
            the file has moved); default: the first with a text tower.

    Raises:
        ConfigError: the model has no text tower, or was not trained on the requested teacher.
        CheckpointError: the teacher's weights are not at the path in the metadata.
    """
    if model.text is not None:
        if spec is not None:
            raise ConfigError(f"{model.name} brings its own text tower; leave --text {spec} out")
        return TextHead(model.name, model.text, None)
    entries = teachers_on(model.metadata, model.name)
    if not entries:
        raise ConfigError(
            f"{model.name} has no text tower and learned from no teacher; zero-shot needs {_HAVE_ONE}"
        )
    if spec is not None and ":" in spec:
        return _matching(model, entries, load_teacher(spec), spec)
    if spec is not None:
        entries = [entry for entry in entries if entry["name"] == spec] or _no_such(model, entries, spec)
    for entry in entries:
        teacher = _load(model, entry)
        if teacher.text is not None:
            _check(model, entry, teacher)
            return TextHead(entry["model"], teacher.text, entry["name"])
    raise ConfigError(
        f"{model.name} learned from {', '.join(entry['model'] for entry in entries)}: none of them has a "
        f"text tower; zero-shot needs {_HAVE_ONE}"
    )


def _no_such(model: Backbone, entries: list[Mapping[str, Any]], spec: str) -> list[Mapping[str, Any]]:
    names = [entry["name"] for entry in entries]
    hint = did_you_mean(spec, names) or f"; it has {', '.join(names)}"
    raise ConfigError(f"{model.name} has no teacher {spec!r}{hint}")


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


def _matching(model: Backbone, entries: list[Mapping[str, Any]], teacher: Teacher, spec: str) -> TextHead:
    """Return the text head of an explicitly named teacher after checking that the metadata has it."""
    if teacher.text is None:
        raise ConfigError(f"{spec} has no text tower; zero-shot needs {_HAVE_ONE}")
    for entry in entries:
        if entry["fingerprint"] == teacher.fingerprint:
            return TextHead(spec, teacher.text, entry["name"])
    raise ConfigError(
        f"{model.name} did not learn from {spec} (none of its teachers has these weights and settings)"
    )


# Letters: K classes, N texts, E text width.

_CLASSES_AT_ONCE = 10
_TEXTS_AT_ONCE = 512


def _ignore(steps: int) -> None:
    """Do nothing."""


def class_vectors(
    tower: TextTower, names: Sequence[str], templates: Sequence[str], advance: Advance = _ignore
) -> Tensor:
    """Compute the class vectors [E, K] float32, one unit column per class.

    Each column is the normalised mean of the normalised vectors of the filled templates, as computed by
    open_clip's `build_zero_shot_classifier` for any tower. The number of classes per batch does not change
    it (beyond the rounding of float32).

    Raises:
        MissingExtraError: open_clip is not installed.
        RadioError: a name that the tower cannot encode.
    """
    made: Tensor = require("open_clip", extra="zeroshot").build_zero_shot_classifier(
        _Encoder(tower, advance),
        _Texts,
        names,
        [partial(_fill, template) for template in templates],
        num_classes_per_batch=_CLASSES_AT_ONCE,
    )
    return made


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TextCache:
    """Cache of the vectors of texts, and how missing ones are computed."""

    folder: Path
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    group: Group = field(default_factory=Group)
    watch: ProgressFactory = no_progress
    damage: Damage = field(default_factory=Damage)


def classifier(
    tower: TextTower, names: Sequence[str], templates: Sequence[str], *, cache: TextCache
) -> Tensor:
    """Return `class_vectors` from the cache, or compute them on one rank; raises the same errors."""
    key = _key("classifier", tower, names, templates)
    bar = partial(cache.watch, "class vectors", len(names) * len(templates))
    build = partial(class_vectors, tower, names, templates)
    return _kept(cache, key, tower, build, bar, (None, len(names)))


def text_vectors(tower: TextTower, texts: Sequence[str], *, cache: TextCache) -> Tensor:
    """Return unit vectors of sentences, [N, E] float32, from the cache, or compute them on one rank."""

    def build(advance: Advance) -> Tensor:
        encode = _Encoder(tower, advance).encode_text
        batches = [list(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, len(texts), _TEXTS_AT_ONCE)]
        return torch.cat([encode(_Texts(batch), normalize=True) for batch in batches])

    bar = partial(cache.watch, "caption vectors", len(texts))
    return _kept(cache, _key("texts", tower, texts), tower, build, bar, (len(texts), None))


@final
class _Texts(list[str]):
    """The texts in place of open_clip's token ids, since a tower tokenizes them itself."""

    def to(self, device: Any) -> _Texts:
        """Return the same texts, since a tower handles its own device."""
        return self


@final
class _Encoder:
    """Adapter of a text tower to the interface of an open_clip model."""

    def __init__(self, tower: TextTower, advance: Advance) -> None:
        self._tower, self._advance = tower, advance

    def encode_text(self, texts: Sequence[str], normalize: bool) -> Tensor:
        """Encode texts to [N, E] float32 on the CPU."""
        vectors = self._tower.encode(texts).float().cpu()
        self._advance(len(texts))
        return to_unit(vectors) if normalize else vectors


def _fill(template: str, name: str) -> str:
    return template.replace("{}", name)


def _key(kind: str, tower: TextTower, *texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([f"{kind}/2", tower.fingerprint, *texts]).encode()).hexdigest()


def _kept(
    cache: TextCache,
    key: str,
    tower: TextTower,
    build: Callable[[Advance], Tensor],
    bar: Callable[[], Any],
    shape: tuple[int | None, int | None],
) -> Tensor:
    """Load the vectors from the cache; the leader computes them first if they are absent or damaged.

    Raises:
        RadioError: the text tower returns values that are not finite.
    """
    path = cache.folder / "texts" / f"{key}.safetensors"
    specs = {"vectors": TensorSpec(torch.float32, shape)}

    def make() -> None:
        if not find_missing([path], partial(read_tensors, specs=specs), cache.damage):
            return
        with bar() as advance, torch.no_grad(), _on_device(tower, cache.device):
            vectors = build(advance)
        if not bool(torch.isfinite(vectors).all()):
            raise RadioError(
                "the text tower gives values that are not finite, or a vector of zeros; look at its weights"
            )
        write_tensors(path, {"vectors": vectors})

    cache.group.on_leader(make)
    check_all_there([path])
    return read_tensors(path, specs).tensors["vectors"]


@contextmanager
def _on_device(tower: TextTower, device: torch.device) -> Iterator[None]:
    """Move the tower to the device, and back to the CPU afterwards, where image vectors are projected."""
    if not isinstance(tower, nn.Module):
        yield
        return
    try:
        tower.to(device)
        yield
    finally:
        tower.to("cpu")

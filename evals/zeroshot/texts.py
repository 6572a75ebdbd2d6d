"""Text towers, and the unit vectors of texts and of classes, cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evals.core.evaluator import EvalRun
from evals.core.features import to_teacher_space, to_unit
from radio.checkpoint import teachers_on
from radio.chunks import (
    TensorSpec,
    check_all_there,
    find_missing,
    read_tensors,
    write_tensors,
)
from radio.errors import CheckpointError, ConfigError, RadioError, did_you_mean
from radio.hub import load_teacher
from radio.progress import UpdateProgress
from radio.types import Backbone, Teacher, TextTower

_HAVE_ONE = (
    "scenes:clip, openclip:NAME@FILE, hf:FOLDER of a CLIP, pip:efficientnet-lite0, or a student that "
    "learned from one of them"
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
        return _named_tower(model, entries, spec)
    if spec is not None:
        names = [entry["name"] for entry in entries]
        if spec not in names:
            hint = did_you_mean(spec, names) or f"; it has {', '.join(names)}"
            raise ConfigError(f"{model.name} has no teacher {spec!r}{hint}")
        entries = [entry for entry in entries if entry["name"] == spec]
    for entry in (entry for entry in entries if "model" in entry):
        teacher = _load(model, entry)
        if teacher.text is None:
            continue
        if teacher.fingerprint != entry.get("fingerprint", teacher.fingerprint):
            raise ConfigError(
                f"{entry['model']} is not the one that {model.name} learned from: its weights or settings "
                f"have changed; name the right one with --text FAMILY:NAME@FILE"
            )
        return TextHead(entry["model"], teacher.text, entry["name"])
    learned = ", ".join(entry.get("model", entry["name"]) for entry in entries)
    unnamed = any("model" not in entry for entry in entries)
    hint = "; name the right one with --text FAMILY:NAME@FILE" * unnamed
    raise ConfigError(
        f"{model.name} learned from {learned}: none of them has a text tower that can be found; zero-shot "
        f"needs {_HAVE_ONE}{hint}"
    )


def _named_tower(model: Backbone, entries: list[Mapping[str, Any]], spec: str) -> TextHead:
    """Return the text head of a teacher's spec after checking that the metadata has the teacher.

    Where the metadata has no fingerprint, the first adaptor into a space of its width is taken.
    """
    named = load_teacher(spec)
    if named.text is None:
        raise ConfigError(f"{spec} has no text tower; zero-shot needs {_HAVE_ONE}")
    for entry in entries:
        if entry.get("fingerprint") == named.fingerprint:
            return TextHead(spec, named.text, entry["name"])
    for entry in entries:
        if "fingerprint" not in entry and _summary_width(model, entry["name"]) == named.summary_dim:
            return TextHead(spec, named.text, entry["name"])
    raise ConfigError(
        f"{model.name} did not learn from {spec} (none of its teachers has these weights and settings)"
    )


def _summary_width(model: Backbone, adaptor: str) -> int | None:
    """Return the width of an adaptor's summaries; None where it gives none."""
    try:
        return to_teacher_space(model, adaptor, torch.zeros(1, model.summary_dim)).shape[1]
    except ConfigError:
        return None


def _load(model: Backbone, entry: Mapping[str, Any]) -> Teacher:
    try:
        return load_teacher(entry["model"])
    except RadioError as error:
        raise CheckpointError(
            f"{model.name} needs the text tower of {entry['model']}, which cannot be loaded: {error}; "
            f"if its file has moved, name it with --text FAMILY:NAME@FILE"
        ) from error


# Letters: K classes, N texts, E text width.

_CLASSES_AT_ONCE = 10
_TEXTS_AT_ONCE = 512


def _ignore(steps: int) -> None:
    """Do nothing."""


def class_vectors(
    tower: TextTower, names: Sequence[str], templates: Sequence[str], advance: UpdateProgress = _ignore
) -> Tensor:
    """Compute the class vectors [E, K] float32, one unit column per class.

    Each column is the normalised mean of the normalised vectors of the filled templates, with the operations
    of open_clip's `build_zero_shot_classifier`. The number of classes per batch does not change it (beyond
    the rounding of float32).

    Raises:
        RadioError: a name that the tower cannot encode.
    """
    columns = []
    with torch.no_grad():
        for start in range(0, len(names), _CLASSES_AT_ONCE):
            batch = names[start : start + _CLASSES_AT_ONCE]
            texts = [template.replace("{}", name) for name in batch for template in templates]
            means = _encode(tower, texts).reshape(len(batch), len(templates), -1).mean(dim=1)
            columns.append((means / means.norm(dim=1, keepdim=True)).T)
            advance(len(texts))
    return torch.cat(columns, dim=1)


def _encode(tower: TextTower, texts: Sequence[str]) -> Tensor:
    """Encode texts to unit vectors [N, E] float32 on the CPU."""
    return to_unit(tower.encode(texts).float().cpu())


def classifier(tower: TextTower, names: Sequence[str], templates: Sequence[str], run: EvalRun) -> Tensor:
    """Return `class_vectors` from the cache, or compute them on one rank; raises the same errors."""
    key = _key("classifier", tower, names, templates)
    bar = partial(run.progress, "class vectors", len(names) * len(templates))
    build = partial(class_vectors, tower, names, templates)
    return _kept(run, key, tower, build, bar, (None, len(names)))


def text_vectors(tower: TextTower, texts: Sequence[str], run: EvalRun) -> Tensor:
    """Return unit vectors of sentences, [N, E] float32, from the cache, or compute them on one rank."""

    def build(advance: UpdateProgress) -> Tensor:
        vectors = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            vectors.append(_encode(tower, texts[start : start + _TEXTS_AT_ONCE]))
            advance(len(vectors[-1]))
        return torch.cat(vectors)

    bar = partial(run.progress, "caption vectors", len(texts))
    return _kept(run, _key("texts", tower, texts), tower, build, bar, (len(texts), None))


def _key(kind: str, tower: TextTower, *texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([f"{kind}/2", tower.fingerprint, *texts]).encode()).hexdigest()


def _kept(
    run: EvalRun,
    key: str,
    tower: TextTower,
    build: Callable[[UpdateProgress], Tensor],
    bar: Callable[[], Any],
    shape: tuple[int | None, int | None],
) -> Tensor:
    """Load the vectors from the cache; the leader computes them first if they are absent or damaged.

    Raises:
        RadioError: the text tower returns values that are not finite.
    """
    path = run.cache / "texts" / f"{key}.safetensors"
    specs = {"vectors": TensorSpec(torch.float32, shape)}

    def make() -> None:
        if not find_missing([path], partial(read_tensors, specs=specs), run.damage):
            return
        with bar() as advance, torch.no_grad(), _on_device(tower, run.device):
            vectors = build(advance)
        if not bool(torch.isfinite(vectors).all()):
            raise RadioError(
                "the text tower gives values that are not finite, or a vector of zeros; look at its weights"
            )
        write_tensors(path, {"vectors": vectors})

    run.ranks.on_leader(make)
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

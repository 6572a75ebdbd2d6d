"""How much of its teachers' features a student reproduces: one pass over images with student and teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from evals.core.blocks import Table
from evals.core.evaluator import EvalRun, Result
from evals.core.features import ImageBatch, View, check_finite, place, read_batches
from evals.core.report import DatasetInfo, Metric, Skipped
from evals.core.stats import Values, interval, resampled_sums
from radio.checkpoint import teachers_on
from radio.chunks import TensorSpec, cached_chunks, chunk_path, read_tensors, write_tensors
from radio.data import ImageSource
from radio.errors import CheckpointError, ConfigError, DataError, RadioError
from radio.hub import load_backbone
from radio.ops import resize_images
from radio.resources import check_memory, fast_products
from radio.types import Backbone, Features, find_adaptor

from . import FidelitySettings
from .measures import Sums, cka, join, no_images, sum_features, summary_errors, token_errors

# Letters: N images, K teachers.

_FORMAT = "fidelity/1"
_CHUNK = 512  # images per file: the most that a killed run loses
_SPECS = {name: TensorSpec(torch.float64, None) for name in Sums._fields}
_COLUMNS = ("unexplained", "cka", "backbone_cka", "angle")


class Reference(NamedTuple):
    """A model that one of the student's adaptors is compared with."""

    name: str  # of the adaptor
    label: str  # of its metrics: the name, and the student's side where there are several
    spec: str
    fingerprint: str | None  # that it must have; None = any
    size: tuple[int, int] | None  # of its input, (height, width) in pixels; None = its own
    student_size: tuple[int, int]


def missing_requirements(model: Backbone) -> str:
    """Explain why the model has no teachers to be compared with; empty if it has."""
    try:
        find_references(model, FidelitySettings())
    except ConfigError as error:
        return str(error)
    return ""


def find_references(model: Backbone, settings: FidelitySettings) -> list[Reference]:
    """Find what to compare a student's adaptors with: what the settings name, or else its teachers.

    Raises:
        ConfigError: the model has no adaptors, or none of a name, or names no teacher's weights.
    """
    if not model.adaptors:
        raise ConfigError(f"{model.name} has no adaptors; fidelity compares those of a distilled student")
    entries = {entry["name"]: entry for entry in teachers_on(model.metadata, model.name)}
    learned = {name: entry["model"] for name, entry in entries.items() if "model" in entry}
    if not (settings.model_of or learned):
        raise ConfigError(
            f"{model.name} does not say which teachers it learned from; name them with --teachers NAME=MODEL "
            f"for adaptors of {', '.join(model.adaptors)}"
        )
    compared = settings.model_of or learned
    if foreign := [name for name in settings.sides_of if name not in compared]:
        raise ConfigError(
            f"--sides {foreign[0]}: is none of the adaptors that are compared; name some of "
            f"{', '.join(compared)}"
        )
    references = []
    for name, spec in compared.items():
        find_adaptor(model, name)  # raises here rather than after the teachers before it
        entry = entries.get(name, {})
        recorded = None if name in settings.model_of else entry.get("fingerprint")
        size = _size(entry.get("resolution"))
        sides: Sequence[Any] = settings.sides_of.get(name, [])
        for side in sides or [entry.get("student_resolution")]:
            label = f"{name}_{side}px" if len(sides) > 1 else name
            own = model.nearest_size(*(_size(side) or model.native_size))
            references.append(Reference(name, label, spec, recorded, size, own))
    return references


def _size(sides: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of a resolution in a checkpoint's metadata."""
    if not sides:
        return None
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[-1])


def evaluate(model: Backbone, settings: FidelitySettings, run: EvalRun) -> Result:
    """Compare a student's adaptors with its teachers, one after the other.

    Raises:
        ConfigError: as `find_references`, or a model that is not the recorded teacher or has other widths.
        CheckpointError: a teacher cannot be loaded.
        DataError: data that are absent, or none of them can be read.
        SizeError: a batch of images is larger than the memory.
        RadioError: features that are not finite, or a teacher's that do not vary.
    """
    references = find_references(model, settings)
    most = settings.num_images
    source = run.open_images(settings.images or "scenes:val", scenes=most, most=most)
    run.note_source(source)
    unlearned = _summaries_without_weight(model)
    notes, metrics, rows = list(source.notes), dict[str, Metric](), list[tuple[str | float | None, ...]]()
    errors: list[Values] = []  # [N, 2] of each teacher
    for reference in references:
        sums, skipped = _compare(model, _load(model, reference), reference, source, run)
        try:
            errors.append(token_errors(sums).numpy())
            angles = None if reference.name in unlearned else summary_errors(sums).numpy()
        except RadioError as error:
            raise RadioError(f"{reference.spec} on {source.name}: {error}") from error
        alike, own = (Metric(value=100 * value) for value in cka(sums))
        measured = {"unexplained": _ratio(errors[-1][:, None], run), "cka": alike, "backbone_cka": own}
        if angles is None:
            notes.append(f"{reference.label}: its summary had no weight in training, hence no angle")
        else:
            measured["angle"] = _ratio(angles[:, None], run)
        metrics |= {f"{name}_{reference.label}": metric for name, metric in measured.items()}
        values = [measured[name].value if name in measured else None for name in _COLUMNS]
        rows.append((reference.label, reference.spec, *values))
    data = DatasetInfo(
        role="images",
        name=source.name,
        fingerprint=source.fingerprint,
        count=len(errors[0]),
        num_classes=0,
        skipped=skipped,
    )
    return Result(
        metrics={"unexplained": _ratio(np.stack(errors, axis=1), run), **metrics},
        baselines={"mean token": 100.0},
        data=[data],
        blocks=[Table(title="each teacher (%)", columns=("adaptor", "model", *_COLUMNS), rows=tuple(rows))],
        notes=notes,
        resolved={"student_size": {each.label: list(each.student_size) for each in references}},
    )


def _ratio(errors: Values, run: EvalRun) -> Metric:
    """Compute the mean over K teachers of ratios of sums [N, K, 2], in percent; a bootstrap over images."""

    def value(sums: Values) -> Values:
        mean: Values = 100 * (sums[..., 0] / sums[..., 1]).mean(axis=-1)
        return mean

    low, high = interval(value(resampled_sums(errors, seed=run.settings.seed)))
    return Metric(value=float(value(errors.sum(axis=0))), low=low, high=high, higher_is_better=False)


def _summaries_without_weight(model: Backbone) -> frozenset[str]:
    """Return the adaptors whose summaries no teacher taught (SAM's).

    A checkpoint's teachers name the weights. Older ones do not, and the settings of the training do.
    """
    entries = teachers_on(model.metadata, model.name)
    if weights := {each["name"]: each["summary_weight"] for each in entries if "summary_weight" in each}:
        return frozenset(name for name, weight in weights.items() if not weight)
    settings: Any = model.metadata.get("settings")
    teachers = settings.get("teachers") if isinstance(settings, Mapping) else None
    taught: dict[str, bool] = {}
    for each in teachers if isinstance(teachers, list) else []:
        if isinstance(each, Mapping):
            name = str(each.get("adaptor") or each.get("name"))
            taught[name] = taught.get(name, False) or each.get("summary_weight") != 0
    return frozenset(name for name, weighs in taught.items() if not weighs)


def _load(model: Backbone, reference: Reference) -> Backbone:
    """Load a reference and check that it is what the adaptor leads to."""
    name, spec = reference.name, reference.spec
    try:
        teacher = load_backbone(spec)
    except RadioError as error:
        raise CheckpointError(
            f"{model.name} is compared with {spec}, which cannot be loaded: {error}; if its file has moved, "
            f"name it with --teachers {name}=MODEL"
        ) from error
    if reference.fingerprint not in (None, teacher.fingerprint):
        raise ConfigError(
            f"{spec} is not the one that {model.name} learned from: its weights or settings have changed; "
            f"name the right one with --teachers {name}=MODEL, or compare with this one by {name}={spec}"
        )
    blank = Features(torch.zeros(1, model.summary_dim), torch.zeros(1, 1, model.token_dim), (1, 1))
    with torch.inference_mode():
        adapted = find_adaptor(model.to(torch.device("cpu"), torch.float32), name)(blank)
    widths = adapted.summary.shape[1], adapted.tokens.shape[2]
    if widths != (teacher.summary_dim, teacher.token_dim):
        raise ConfigError(
            f"the adaptor {name} of {model.name} gives summaries and tokens of widths {widths}, and {spec} "
            f"has {(teacher.summary_dim, teacher.token_dim)}; compare it with a model of its widths"
        )
    return teacher


def _compare(
    model: Backbone, teacher: Backbone, reference: Reference, source: ImageSource, run: EvalRun
) -> tuple[Sums, tuple[Skipped, ...]]:
    """Sum over all images; return those that could not be read, too."""
    size = teacher.nearest_size(*(reference.size or teacher.native_size))
    batch, total = run.batch_size(32), len(source.keys)
    for each, shown in ((model, reference.student_size), (teacher, size)):
        check_memory(each, min(batch, total), shown, run.device, run.dtype)
    prints = [model.fingerprint, teacher.fingerprint, source.fingerprint]
    key = json.dumps([_FORMAT, *prints, run.precision, reference.name, size, reference.student_size])
    folder = run.cache / "fidelity" / hashlib.sha256(key.encode()).hexdigest()
    spans = [range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]

    def make(missing: list[int]) -> None:
        student, other = (place(each, run.device, run.dtype) for each in (model, teacher))
        label = f"{model.name} as {reference.name}"
        with run.progress(label, sum(len(spans[number]) for number in missing)) as advance:
            for number in missing:
                sums = no_images(teacher.summary_dim, teacher.token_dim, model.token_dim)
                skipped: list[tuple[str, str]] = []
                for read in _squares(source, spans[number], max(*size, *reference.student_size), batch, run):
                    for images in read.images(run.device):
                        with fast_products(run.device), torch.inference_mode():
                            own = student(resize_images(images, reference.student_size).to(run.dtype))
                            theirs = other(resize_images(images, size).to(run.dtype))
                            adapted = find_adaptor(student, reference.name)(own, theirs.grid)
                            sums = join([sums, sum_features(own, adapted, theirs).cpu()])
                    keys = (source.keys[index] for index in read.places)
                    skipped += [pair for pair in zip(keys, read.reasons, strict=True) if pair[1]]
                    advance(len(read.places))
                check_finite(sums.products, f"{model.name} or {reference.spec}")
                write_tensors(chunk_path(folder, number), sums._asdict(), {"skipped": json.dumps(skipped)})

    read = partial(read_tensors, specs=_SPECS)
    paths = cached_chunks(folder, len(spans), read=read, make=make, ranks=run.ranks, damage=run.damage)
    chunks = [read(path) for path in paths]
    skipped = [Skipped(key=k, reason=r) for c in chunks for k, r in json.loads(c.metadata["skipped"])]
    if len(skipped) == total:
        first = skipped[0]
        raise DataError(f"{source.name}: none of {total} images can be read; {first.key}: {first.reason}")
    return join([Sums(**chunk.tensors) for chunk in chunks]), tuple(skipped)


def _squares(source: ImageSource, span: range, side: int, batch: int, run: EvalRun) -> Iterator[ImageBatch]:
    """Read the central squares of images, of a side in pixels."""
    view = View(kind="center", size=(side, side), ratio=1.0, nearest_size=lambda *size: size)
    batches = [list(span[start : start + batch]) for start in range(0, len(span), batch)]
    return read_batches(source, view, batches, workers=run.workers, device=run.device)

"""Two models on the same samples: the interval of the difference of their primary metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, FiniteFloat, NonNegativeInt, TypeAdapter
from typing_extensions import TypedDict

from evals.core.areas import Values, area_ratios, mean_present
from evals.core.bootstrap import interval, resamples
from radio.io import validate

from .records import Entry, read_records

_MAX_CLASSES = 10_000  # areas of each class are held for each image

# Letters: N samples, U units, R resamples, F files of records, C classes.


class Sample(NamedTuple):
    """The values of one record; a primary metric is computed from their sum over samples."""

    key: str
    unit: str  # of resampling: an image
    values: Values  # [2]: a score in [0, 1] and its count; for the probe [3, C]: areas


class Samples(NamedTuple):
    """All records of a report."""

    keys: list[str]  # [N]
    units: list[str]  # [N]
    values: Values  # [N, F, ...]; a sample is zero for all files but its own

    def ordered_as(self, keys: list[str]) -> Samples:
        """Return the same samples in the order of `keys`."""
        places = {key: place for place, key in enumerate(self.keys)}
        order = [places[key] for key in keys]
        return Samples(keys, [self.units[place] for place in order], self.values[order])


def paired_interval(new: Entry, old: Entry) -> tuple[float, float] | None:
    """Compute the 95 % interval of the difference of two primary metrics, in percent.

    It is a paired bootstrap over shared images. None where a task has no records, or where they are not of
    the same samples or do not give the reports' own values (a primary metric that is a mean over heads, or
    a rank).
    """
    ours, theirs = (_samples(entry) for entry in (new, old))
    if ours is None or theirs is None or sorted(ours.keys) != sorted(theirs.keys):
        return None
    ours = ours.ordered_as(theirs.keys)
    primary_metric = _mean_iou if old.report.task == "seg" else _mean_of_files
    for entry, samples in ((new, ours), (old, theirs)):
        reported = entry.report.metrics[entry.report.primary_metric].value
        if not abs(primary_metric(samples.values.sum(axis=0)[None])[0] - reported) <= 0.01:
            return None
    units, of = np.unique(theirs.units, return_inverse=True)
    weights = resamples(len(units))
    drawn = []
    for samples in (ours, theirs):
        sums = np.zeros((len(units), *samples.values.shape[1:]))
        np.add.at(sums, of, samples.values)
        drawn.append(primary_metric(np.tensordot(weights, sums, axes=1)))
    return interval(drawn[0] - drawn[1])


def _samples(entry: Entry) -> Samples | None:
    report = entry.report
    reader = _READERS.get(report.task)
    num_classes = report.data[-1].num_classes if report.data else 0
    if reader is None or num_classes > _MAX_CLASSES:
        return None
    found, remarks = read_records(entry, lambda record: reader(record, num_classes))
    if remarks or not found:
        return None
    parts = {name.removeprefix(entry.path.stem): lines for name, lines in found.items()}
    # the name of a file is part of a key: benchmarks count their questions from 0
    keys = [f"{part}:{sample.key}" for part in sorted(parts) for sample in parts[part]]
    if len(set(keys)) < len(keys):
        return None
    units = [sample.unit for part in sorted(parts) for sample in parts[part]]
    shape = next(iter(parts.values()))[0].values.shape
    values = np.zeros((len(keys), len(parts), *shape))
    start = 0
    for place, part in enumerate(sorted(parts)):
        stop = start + len(parts[part])
        values[start:stop, place] = [sample.values for sample in parts[part]]
        start = stop
    return Samples(keys, units, values)


def _scored(key: Any, unit: Any, score: float) -> Sample:
    return Sample(str(key), str(unit), np.array([score, 1.0]))


class _Predicted(TypedDict):
    key: str
    label: str
    predictions: list[str]


class _Correct(TypedDict):
    key: str
    correct: bool


class _Mask(TypedDict):
    annotation_id: int
    image_id: int | str
    iou: FiniteFloat


class _Answer(TypedDict):
    question_id: str | int
    image: str | None
    score: FiniteFloat


class _Areas(TypedDict):
    image: str
    areas: list[Annotated[list[NonNegativeInt], Field(min_length=4, max_length=4)]]  # class, then pixels


_PREDICTED, _CORRECT, _MASK = TypeAdapter(_Predicted), TypeAdapter(_Correct), TypeAdapter(_Mask)
_ANSWER, _AREAS = TypeAdapter(_Answer), TypeAdapter(_Areas)


def _predicted(record: Any, _: int) -> Sample:
    line = validate(_PREDICTED, record, "record")
    return _scored(line["key"], line["key"], line["predictions"][:1] == [line["label"]])


def _correct(record: Any, _: int) -> Sample:
    line = validate(_CORRECT, record, "record")
    return _scored(line["key"], line["key"], line["correct"])


def _mask(record: Any, _: int) -> Sample:
    line = validate(_MASK, record, "record")
    return _scored(line["annotation_id"], line["image_id"], line["iou"])


def _answer(record: Any, _: int) -> Sample:
    line = validate(_ANSWER, record, "record")
    return _scored(line["question_id"], line["image"] or line["question_id"], line["score"])


def _areas(record: Any, num_classes: int) -> Sample:
    line = validate(_AREAS, record, "record")
    areas = np.zeros((3, num_classes))
    for index, *pixels in line["areas"]:
        areas[:, index] = pixels
    return Sample(line["image"], line["image"], areas)


_READERS: Mapping[str, Callable[[Any, int], Sample]] = {
    "knn": _predicted,
    "zeroshot": _correct,
    "sam": _mask,
    "vqa": _answer,
    "seg": _areas,
}
"""For each task: turns a record, given the number of classes, into a sample of the primary metric."""


def _mean_of_files(sums: Values) -> Values:
    """Average the mean scores of the files, in percent: [R, F, 2] -> [R]."""
    with np.errstate(invalid="ignore"):
        means: Values = (sums[..., 0] / sums[..., 1]).mean(axis=-1)
    return 100 * means


def _mean_iou(areas: Values) -> Values:
    """Compute the mIoU in percent over the classes that occur: [R, 1, 3, C] -> [R]."""
    return mean_present(area_ratios(areas[:, 0])[0])

"""Feature maps: the first three principal components of a model's tokens as red, green and blue.

A student is also shown through each adaptor along its teacher's components, beside the teacher: there equal
colors are equal features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Interval
from torch import Tensor

from evals.core.blocks import ImageGrid, ImageRow
from evals.core.evaluator import EvalRun, Evaluator, Result
from evals.core.pca import Components
from evals.core.report import DatasetInfo, Metric, Skipped
from radio.checkpoint import TeacherEntry
from radio.config import check
from radio.data import ImageSource
from radio.errors import DataError, RadioError
from radio.hub import load_backbone
from radio.images import resize
from radio.types import Backbone, Features

# Letters: N images, T tokens, D token width, H W grid.

_SIDE = 112  # of an image on the page in pixels
_TITLE = (
    "the first three principal components of the tokens as red, green and blue, fitted over the images "
    "shown; one square is one token. Colors of two models say nothing of one another, except where a student "
    "stands along its teacher's axes: there equal colors are equal features"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MapsSettings:
    """Feature maps of a few images."""

    query: str = "scenes:val"
    """The images: a folder with one folder per class, tar shards, or the generated world."""
    num_images: Annotated[int, Interval(ge=1, le=24)] = 6
    """Number of images, spread evenly."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` on a value out of range."""
        check(self)


class _Shown(NamedTuple):
    """The images that are shown."""

    keys: list[str]
    pixels: list[Tensor]  # uint8 [3, h, w] each


def evaluate(model: Backbone, settings: MapsSettings, run: EvalRun) -> Result:
    """Draw a model's feature maps, and its maps along its teachers' axes; score the variance that they show.

    A teacher that cannot be loaded is noted.

    Raises:
        DataError: data that are absent or damaged, or tokens that are not finite.
    """
    source = run.open_images(settings.query)
    shown, data = _read_images(source, settings.num_images)
    size = model.nearest_size(*model.native_size)
    features = _encode(model, shown, size, run)
    basis = _fit(model.name, features)
    share = 100 * basis.explained(features.tokens.cpu())
    images = [
        run.save_image(pixels, key, side=2 * _SIDE, shown=_SIDE)
        for key, pixels in zip(shown.keys, shown.pixels, strict=True)
    ]
    rows = [
        ImageRow(name="images", note=source.name, images=tuple(images)),
        _draw(model.name, features, basis, _size_text(size), shown, run),
    ]
    notes = []
    teachers: list[TeacherEntry] = model.metadata.get("teachers") or []  # checked when it was read
    for entry in teachers:
        if "model" not in entry:
            continue
        try:
            teacher = load_backbone(entry["model"])
        except RadioError as error:
            notes.append(f"{model.name}'s teacher {entry['model']} is not shown: {error}")
            continue
        rows += _beside_teacher(model, entry, teacher, shown, run)
    return Result(
        metrics={"explained": Metric(value=share, higher_is_better=None)},
        data=[data],
        blocks=[ImageGrid(title=_TITLE, rows=tuple(rows))],
        resolved={"size": list(size), "grid": list(features.grid)},
        notes=notes,
    )


def _read_images(source: ImageSource, count: int) -> tuple[_Shown, DatasetInfo]:
    """Read images that are evenly spread over a source; those that cannot be read are skipped."""
    count = min(count, len(source.keys))
    shown, skipped = _Shown([], []), []
    for index in (number * len(source.keys) // count for number in range(count)):
        key = source.keys[index]
        try:
            shown.pixels.append(source.read(index))
            shown.keys.append(key)
        except DataError as error:
            skipped.append(Skipped(key=key, reason=str(error)))
    if not shown.keys:
        raise DataError(
            f"{source.name}: none of the {count} images could be read, the first because: {skipped[0].reason}"
        )
    data = DatasetInfo(
        role="query",
        name=source.name,
        fingerprint=source.fingerprint,
        count=len(shown.keys),
        num_classes=len(source.classes),
        skipped=tuple(skipped),
    )
    return shown, data


def _beside_teacher(
    student: Backbone, entry: TeacherEntry, teacher: Backbone, shown: _Shown, run: EvalRun
) -> Iterator[ImageRow]:
    """Draw a teacher, and the student through its adaptor for that teacher, both along the teacher's axes."""
    size = teacher.nearest_size(*teacher.native_size)
    features = _encode(teacher, shown, size, run)
    basis = _fit(teacher.name, features)
    yield _draw(teacher.name, features, basis, _size_text(size), shown, run)
    name = entry["name"]
    if name in student.adaptors:
        sides = entry.get("student_resolution") or student.native_size
        height, width = (sides, sides) if isinstance(sides, int) else (sides[0], sides[-1])
        size = student.nearest_size(height, width)
        own = _encode(student, shown, size, run)
        with torch.inference_mode():
            adapted = student.adaptors[name](own)
        note = f"{_size_text(size)}, along {teacher.name}'s axes"
        yield _draw(f"{student.name} as {name}", adapted, basis, note, shown, run)


def _encode(model: Backbone, shown: _Shown, size: tuple[int, int], run: EvalRun) -> Features:
    """Encode images, stretched to a size that the model takes, one at a time to need little memory."""
    model = model.to(run.device, run.dtype).eval()
    with torch.inference_mode():
        outputs = [
            model(resize(image, size).unsqueeze(0).to(run.device, run.dtype)) for image in shown.pixels
        ]
    return Features(
        torch.cat([output.summary for output in outputs]),
        torch.cat([output.tokens for output in outputs]),
        outputs[0].grid,
    )


def _fit(name: str, features: Features) -> Components:
    try:
        return Components.fit(features.tokens.flatten(0, 1).cpu())
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _draw(
    name: str, features: Features, basis: Components, note: str, shown: _Shown, run: EvalRun
) -> ImageRow:
    """Save a map for each image, a pixel for each token."""
    height, width = features.grid
    tokens = features.tokens.cpu()
    colors = basis.colors(tokens).unflatten(1, (height, width))
    pixels = (255 * colors).round().to(torch.uint8).permute(0, 3, 1, 2)
    share = 100 * basis.explained(tokens)
    images = [
        run.save_image(image, f"{name}: {key}", side=2 * _SIDE, shown=_SIDE, exact=True)
        for key, image in zip(shown.keys, pixels, strict=True)
    ]
    note = f"{note}, {width} x {height} tokens, {share:.0f} % of the variance"
    return ImageRow(name=name, note=note, images=tuple(images))


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} px"


MAPS = Evaluator(name="maps", settings=MapsSettings, evaluate=evaluate, title="spatial features")

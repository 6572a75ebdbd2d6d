"""Feature maps: the first three principal components of a model's tokens as red, green and blue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from evals.core.blocks import ImageGrid, ImageRow
from evals.core.evaluator import EvalRun, Result
from evals.core.report import DatasetInfo, Metric, Skipped
from radio.checkpoint import TeacherEntry
from radio.data import ImageSource
from radio.errors import DataError, RadioError
from radio.hub import load_backbone
from radio.images import resize
from radio.types import Backbone, Features

from . import MapsSettings

# Letters: N images, T tokens, D token width, H W grid.

_SIDE = 112  # of an image on the page in pixels
_TITLE = (
    "the first three principal components of the tokens as red, green and blue, fitted over the images "
    "shown; one square is one token. Colors of two models say nothing of one another, except where a student "
    "stands along its teacher's axes: there equal colors are equal features"
)

_Shown = dict[str, Tensor]  # the images that are shown by their keys, uint8 [3, h, w] each


def evaluate(model: Backbone, settings: MapsSettings, run: EvalRun) -> Result:
    """Draw a model's feature maps, and its maps along its teachers' axes; score the variance that they show.

    A teacher that cannot be loaded is noted.

    Raises:
        DataError: data that are absent or damaged, or tokens that are not finite.
    """
    source = run.open_images(settings.query or "scenes:val")
    run.ranks.on_leader(lambda: source.fingerprint)  # hashes the content; other ranks read the memo
    shown, data = _read_images(source, settings.num_images)
    size = model.nearest_size(*model.native_size)
    features = _encode(model, shown, size, run)
    basis = _fit(model.name, features)
    share = 100 * basis.explained(features.tokens.cpu())
    images = [run.save_image(pixels, key, side=2 * _SIDE, shown=_SIDE) for key, pixels in shown.items()]
    rows = [
        ImageRow(name="images", note=source.name, images=tuple(images)),
        _draw(model.name, features, basis, _size_text(size), shown, run),
    ]
    notes = list(source.notes)
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
    shown: _Shown = {}
    skipped = []
    for index in (number * len(source.keys) // count for number in range(count)):
        key = source.keys[index]
        try:
            shown[key] = source.read(index)
        except DataError as error:
            skipped.append(Skipped(key=key, reason=str(error)))
    if not shown:
        raise DataError(
            f"{source.name}: none of the {count} images could be read, the first because: {skipped[0].reason}"
        )
    data = DatasetInfo(
        role="query",
        name=source.name,
        fingerprint=source.fingerprint,
        count=len(shown),
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
            model(resize(image, size).unsqueeze(0).to(run.device, run.dtype)) for image in shown.values()
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
        for key, image in zip(shown, pixels, strict=True)
    ]
    note = f"{note}, {width} x {height} tokens, {share:.0f} % of the variance"
    return ImageRow(name=name, note=note, images=tuple(images))


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} px"


# Letters: P tokens of all images, D token width, C components.

NUM_COMPONENTS = 3
_EDGE = 0.01  # share of the values that is clipped on either side
_ROUNDING = 1e-6  # of the widest component's range: a smaller one counts as constant


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """A basis of principal components, and the range of coordinates that the colors cover."""

    mean: Tensor  # [D]
    axes: Tensor  # [C, D], of unit length
    low: Tensor  # [C]
    high: Tensor  # [C]

    @classmethod
    def fit(cls, tokens: Tensor) -> Self:
        """Fit the first three components to tokens [P, D], in float64.

        The sign of an axis is the one that makes its largest entry positive. Where the tokens have fewer
        than three dimensions, the other components are 0.

        Raises:
            DataError: values that are not finite.
        """
        if not torch.isfinite(tokens).all():
            raise DataError("the tokens hold values that are not finite, which have no components")
        points = tokens.double()
        mean = points.mean(dim=0)
        centred = points - mean
        vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors  # ascending
        kept = min(NUM_COMPONENTS, len(mean))
        axes = centred.new_zeros(NUM_COMPONENTS, len(mean))
        axes[:kept] = vectors.T.flip(0)[:kept]
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        axes *= torch.where(largest < 0, -1.0, 1.0)
        coordinates = centred @ axes.T
        low, high = (coordinates.quantile(q, dim=0) for q in (_EDGE, 1 - _EDGE))
        return cls(mean=mean, axes=axes, low=low, high=high)

    def coordinates(self, tokens: Tensor) -> Tensor:
        """Project tokens [..., D] onto the axes: [..., C]."""
        return (tokens.double() - self.mean) @ self.axes.T

    def explained(self, tokens: Tensor) -> float:
        """Compute the share of the variance of tokens [..., D] along the axes; 0 where they do not vary."""
        centred = tokens.double().flatten(0, -2)
        centred = centred - centred.mean(dim=0)
        total = float(centred.square().sum())
        return float((centred @ self.axes.T).square().sum()) / total if total else 0.0

    def colors(self, tokens: Tensor) -> Tensor:
        """Turn tokens [..., D] into colors [..., C] in [0, 1]; grey where a component does not vary."""
        span = self.high - self.low
        varies = span > _ROUNDING * span.max()
        shown = (self.coordinates(tokens) - self.low) / torch.where(varies, span, 1.0)
        return torch.where(varies, shown, 0.5).clamp(0, 1)

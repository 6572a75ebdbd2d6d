"""Spatial features as colours: the first three principal components of a backbone's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio.errors import DataError, RadioError
from radio.hub import load_backbone
from radio.images import resize
from radio.model import RadioModel
from radio.types import Backbone, Features

# Letters: N images, T tokens, P tokens of all images, D token width, C components, H W grid.

NUM_COMPONENTS = 3
_EDGE = 0.01  # share of the values that is clipped on either side
_ROUNDING = 1e-6  # of the widest component's range: a smaller one counts as constant

Bytes = NDArray[np.uint8]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """A basis of principal components, and the range of coordinates that the colours cover."""

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

    def colours(self, tokens: Tensor) -> Tensor:
        """Turn tokens [..., D] into colours [..., C] in [0, 1]; grey where a component does not vary."""
        span = self.high - self.low
        varies = span > _ROUNDING * span.max()
        shown = (self.coordinates(tokens) - self.low) / torch.where(varies, span, 1.0)
        return torch.where(varies, shown, 0.5).clamp(0, 1)


class Maps(NamedTuple):
    """One model's feature maps of the images."""

    model: str
    note: str  # size, grid, share of the variance
    images: tuple[Bytes, ...]  # [H, W, 3] each


class Taught(NamedTuple):
    """A teacher as the student's metadata names it."""

    name: str  # of the adaptor
    spec: str
    size: tuple[int, int] | None  # of the student's input when it learns from this teacher


def draw_maps(
    specs: Sequence[str], images: Sequence[Tensor], optional: Sequence[str] = ()
) -> tuple[list[Maps], list[str]]:
    """Draw the maps of each model once; return them with notes on models that could not be loaded.

    A student adds the teachers that its metadata names.

    Args:
        specs: as `radio.hub.load_backbone` takes them.
        images: uint8 [3, h, w] each.
        optional: specs of models that are left out where they cannot be loaded.

    Raises:
        RadioError: a spec that names no model, or tokens that are not finite.
    """
    found: dict[str, list[Maps]] = {}  # by fingerprint
    notes: list[str] = []
    for spec in dict.fromkeys((*specs, *optional)):
        try:
            model = load_backbone(spec)
        except RadioError as error:
            if spec in specs:
                raise
            notes.append(f"{spec} is not shown: {error}")
            continue
        if model.fingerprint in found:
            continue
        found[model.fingerprint] = [own_map(model, images)]
        for taught in teachers_of(model):
            try:
                teacher = load_backbone(taught.spec)
            except RadioError as error:
                notes.append(f"{model.name}'s teacher {taught.spec} is not shown: {error}")
                continue
            beside = teacher_maps(model, taught, teacher, images)
            found.setdefault(teacher.fingerprint, beside[:1])
            found[f"{model.fingerprint} {taught.name}"] = beside[1:]
    return [one for group in found.values() for one in group], notes


def own_map(model: Backbone, images: Sequence[Tensor]) -> Maps:
    """Draw the maps of a model's own tokens, with components fitted over the images shown.

    Raises:
        DataError: tokens that are not finite.
    """
    size = model.nearest_size(*model.native_size)
    features = encode(model, images, size)
    return _shown(model.name, features, _fit(model.name, features), _words(size))


def teacher_maps(
    student: Backbone, taught: Taught, teacher: Backbone, images: Sequence[Tensor]
) -> list[Maps]:
    """Draw a teacher's maps, and the student's through its adaptor for that teacher, if it has one.

    Both use the teacher's components, so that equal colours are equal features.

    Raises:
        DataError: tokens that are not finite.
    """
    size = teacher.nearest_size(*teacher.native_size)
    features = encode(teacher, images, size)
    basis = _fit(teacher.name, features)
    found = [_shown(teacher.name, features, basis, _words(size))]
    if isinstance(student, RadioModel) and taught.name in student.adaptors:
        own_size = student.nearest_size(*(taught.size or student.native_size))
        own = encode(student, images, own_size)
        with torch.inference_mode():
            carried = student.adapt(taught.name, own)
        name = f"{student.name} as {taught.name}"
        found.append(_shown(name, carried, basis, f"{_words(own_size)}, along {teacher.name}'s axes"))
    return found


def encode(model: Backbone, images: Sequence[Tensor], size: tuple[int, int]) -> Features:
    """Encode images, uint8 [3, h, w] each, stretched to a size that the model takes.

    One image at a time, so that a large model needs little memory.
    """
    model = model.to(torch.device("cpu"), torch.float32).eval()
    with torch.inference_mode():
        found = [model(resize(image, size).unsqueeze(0)) for image in images]
    return Features(
        torch.cat([one.summary for one in found]), torch.cat([one.tokens for one in found]), found[0].grid
    )


def teachers_of(model: Backbone) -> tuple[Taught, ...]:
    """Return the teachers that a student's metadata names; empty for other backbones."""
    named = model.metadata.get("teachers") if isinstance(model, RadioModel) else None
    found = []
    for teacher in named if isinstance(named, list) else ():
        if "model" not in teacher:
            continue
        size = teacher.get("student_resolution")
        if isinstance(size, int):
            size = [size, size]
        found.append(Taught(teacher["name"], teacher["model"], tuple(size) if size else None))
    return tuple(found)


def _fit(name: str, features: Features) -> Components:
    try:
        return Components.fit(features.tokens.flatten(0, 1))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _words(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} px"


def _shown(name: str, features: Features, basis: Components, note: str) -> Maps:
    height, width = features.grid
    colours = basis.colours(features.tokens).unflatten(1, (height, width))
    pixels = (255 * colours).round().to(torch.uint8).numpy()
    share = 100 * basis.explained(features.tokens)
    note = f"{note}, {width} x {height} tokens, {share:.0f} % of the variance"
    return Maps(name, note, tuple(pixels))

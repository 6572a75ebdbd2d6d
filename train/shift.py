"""Shifted crops: student and teachers see an image through frames moved by whole patches (C-RADIOv4, eq. 1).

What a teacher adds to its features by position alone, such as holes at the border or seams between windows,
cannot be predicted by a student that does not know where the teacher's grid lies; it learns the rest.

The crop that the loader gives is a canvas, which all models see the same part of, but for the shifts. Each
model resizes the canvas to a scale of its own and cuts its frame out of it, a rectangle of its input's size
that begins at a whole pixel, so that nothing is interpolated beyond this one resize. Without a shift the
frame is in the middle. The margin around it has room for the largest shift of the model with the fewest
patches along a side, g: it is the same share of every model's input, K / g for shifts of up to K patches,
rounded to whole pixels. A shift moves the frame by patches of the model itself.

The losses are means over the part of the image that both frames show. Since frames are shifted but neither
turned nor scaled, that is a rectangle of each grid. Where the grids have as many tokens, on frames of exactly
the same share of the canvas, the tokens of both coincide, and are cut out. Elsewhere the map with more tokens
is sampled at the centres of the other's tokens, those that lie between the centres of its own.

Draws are equal for all images and ranks of a step (ours), so that both are slices, or one sampling for all.
Every draw is one of a model and a step. Beyond K = ceil(3 std) patches shifts are cut off, which concerns
less than 0.3 % of them, since each further patch costs a margin of every canvas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from radio.errors import ConfigError
from radio.ops import resize_images
from radio.types import Positions, Sampling

from .data.crops import generator
from .groups import TeacherGroup

# Letters: B images, h w pixels, K largest shift and g fewest patches along a side.

Shift: TypeAlias = tuple[int, int]  # down and right, in patches


class Shifts(NamedTuple):
    """The shifts of one step."""

    student: Shift
    average: Shift  # of the averaged student's frame, for MESA
    teachers: dict[str, Shift]


class Input(NamedTuple):
    """What a model takes."""

    size: tuple[int, int]  # (height, width) in pixels
    patch: int  # pixels along one side of a token

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) in tokens."""
        return self.size[0] // self.patch, self.size[1] // self.patch


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A model's part of the canvas, in pixels of the model; pairs are rows, then columns."""

    input: Input
    margin: tuple[int, int]  # from each edge of the canvas to the frame without a shift
    shift: Shift = (0, 0)

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of the canvas."""
        (h, w), (y, x) = self.input.size, self.margin
        return h + 2 * y, w + 2 * x

    @property
    def corner(self) -> tuple[int, int]:
        """(top, left) of the frame."""
        (y, x), (down, right), patch = self.margin, self.shift, self.input.patch
        return y + down * patch, x + right * patch


class Frames(NamedTuple):
    """The frames of the models of one group in one step."""

    student: Frame
    average: Frame
    teachers: dict[str, Frame]

    @property
    def crop_side(self) -> int:
        """Side in pixels of a square crop from which no canvas is enlarged."""
        return max(max(frame.canvas) for frame in (self.student, *self.teachers.values()))


LEAST_SHIFT = 0.15
"""Deviation below which fewer than one draw in a thousand is rounded to another number than 0."""


def largest_shift(std: float) -> int:
    """Return K, the largest shift in patches for draws of a standard deviation."""
    return math.ceil(3 * std)


def draw_shifts(std: float, teachers: Sequence[str], seed: int, step: int) -> Shifts:
    """Draw the shifts of a step, round(N(0, std)) for each model and axis.

    Args:
        std: in patches; 0 moves nothing.
        teachers: all of the run, so that every rank draws the same.
        seed: the stage's.
        step: of the stage.
    """
    normal = torch.randn(len(teachers) + 2, 2, generator=generator(seed, "shift", step))
    most = largest_shift(std)
    whole = (normal * std).round().clamp(-most, most).int()
    student, average, *others = [(down, right) for down, right in whole.tolist()]
    return Shifts(student, average, dict(zip(teachers, others, strict=True)))


def make_frames(std: float, student: Input, teachers: Mapping[str, Input], shifts: Shifts) -> Frames:
    """Place the frames of a group's models on the canvas that they share.

    Raises:
        ConfigError: a model has so few patches that the frames may have nothing in common.
    """
    most = largest_shift(std)
    inputs = {"the student": student, **{f"teacher {name}": each for name, each in teachers.items()}}
    fewest = min(min(each.grid) for each in inputs.values())
    if 2 * most > fewest - 2:
        name, least = min(inputs.items(), key=lambda item: min(item[1].grid))
        largest = max(fewest - 2, 0) // 2 * 10 // 3 / 10
        remedy = f"give at most {largest:g}" if largest else "leave it out"
        raise ConfigError(
            f"--loss.shift {std}: {name} has {least.grid[0]} x {least.grid[1]} patches, and two frames that "
            f"are shifted by up to {most} of them may have nothing in common; {remedy}, or give a larger "
            f"resolution"
        )

    def frame(model: Input, shift: Shift) -> Frame:
        h, w = (round(Fraction(most * side, fewest)) for side in model.size)
        return Frame(input=model, margin=(h, w), shift=shift)

    return Frames(
        frame(student, shifts.student),
        frame(student, shifts.average),
        {name: frame(each, shifts.teachers[name]) for name, each in teachers.items()},
    )


@final
class Framing:
    """The frames of all models of a run in every step.

    Args:
        std: deviation of the shifts in patches, above 0.
        seed: the run's.
        patch: pixels along one side of the student's token.
        teachers: the inputs of all teachers of the run, in its order, by the student's side.
        second: whether the averaged student sees a frame of its own.
    """

    def __init__(
        self,
        std: float,
        seed: int,
        patch: int,
        teachers: Mapping[str, Mapping[int, Input]],
        *,
        second: bool = False,
    ) -> None:
        self.second = second
        self._std, self._seed, self._patch, self._teachers = std, seed, patch, teachers

    def at(self, group: TeacherGroup, step: int) -> Frames:
        """Return the frames of a group's models in a step, equal on all ranks."""
        shifts = draw_shifts(self._std, list(self._teachers), self._seed, step)
        return self._place(group, group.side_at(self._seed, step), shifts)

    def unshifted(self, group: TeacherGroup, side: int) -> Frames:
        """Return the frames of a group's models without shifts, at a side of the student's input.

        Raises:
            ConfigError: as `make_frames`.
        """
        return self._place(group, side, Shifts((0, 0), (0, 0), dict.fromkeys(self._teachers, (0, 0))))

    def crop_sides(self, group: TeacherGroup) -> dict[int, int]:
        """Return the side of a group's crops in pixels, by the student's side: that of the largest canvas.

        Raises:
            ConfigError: as `make_frames`.
        """
        return {side: self.unshifted(group, side).crop_side for side in group.sides}

    def _place(self, group: TeacherGroup, side: int, shifts: Shifts) -> Frames:
        teachers = {name: self._teachers[name][side] for name in group.teachers}
        return make_frames(self._std, Input((side, side), self._patch), teachers, shifts)


def cut(canvas: Tensor, frame: Frame) -> Tensor:
    """Cut a model's frame out of canvases [B, 3, side, side] in [0, 1]: [B, 3, h, w] of its input's size."""
    (top, left), (h, w) = frame.corner, frame.input.size
    return resize_images(canvas, frame.canvas)[..., top : top + h, left : left + w].contiguous()


def overlap(student: Frame, other: Frame) -> tuple[Sampling, Sampling]:
    """Find the tokens of two frames that show the same places: where to sample each of both maps.

    The map with more tokens, or the student's of two equal ones, is sampled at centres of the other's tokens.
    """
    if math.prod(other.input.grid) <= math.prod(student.input.grid):
        places, sampled = _samplings(other, student)
        return sampled, places
    return _samplings(student, other)


def _samplings(coarse: Frame, fine: Frame) -> tuple[Sampling, Sampling]:
    rows, columns = (_shared(coarse, fine, axis) for axis in range(2))
    return Sampling(rows[0], columns[0]), Sampling(rows[1], columns[1])


def _shared(coarse: Frame, fine: Frame, axis: int) -> tuple[Positions, Positions]:
    """Find the coarse tokens whose centres are between fine ones: their indices, and positions in the fine.

    In fractions, since a position that is a token's centre must be exactly that.
    """
    patch, side = coarse.input.patch, coarse.canvas[axis]
    fine_patch, fine_side = fine.input.patch, fine.canvas[axis]
    centre = Fraction(2 * coarse.corner[axis] + patch, 2 * side)  # of the first token, as share of the canvas
    first = (centre * fine_side - fine.corner[axis]) / fine_patch - Fraction(1, 2)
    step = Fraction(patch * fine_side, side * fine_patch)
    low = max(0, math.ceil(-first / step))
    high = min(coarse.input.grid[axis], math.floor((fine.input.grid[axis] - 1 - first) / step) + 1)
    assert low < high, "make_frames lets no frames be disjoint"
    return Positions(Fraction(low), Fraction(1), high - low), Positions(first + low * step, step, high - low)

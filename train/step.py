"""Forward and losses of one group's pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from radio.model import RadioModel
from radio.resample import resize_images
from radio.types import Features, Student, Teacher, Windowed

from .balancing import AdaLoss, Balanced, Balancer, Naive
from .batches import Lesson
from .config import LossConfig, TeacherConfig
from .losses import TeacherLosses, centred_cosine, teacher_losses

# Letters: B batch, h w pixels.

Encode = Callable[[Tensor, Tensor | None, int | None], Features]


class Part(NamedTuple):
    """What one forward takes."""

    lesson: Lesson
    drawn: Tensor | None  # what the student draws at random for its pictures, see `Student.draw`


class Losses(NamedTuple):
    """The losses of one lesson; `parts` stay on the device until the log step."""

    total: Tensor  # []
    parts: dict[str, Tensor]  # "clip/summary", "clip/spatial": [] each, unweighted; weights that move
    details: dict[str, Tensor]  # "clip/centred_cosine": [] each, where they were asked for


class StudentPass(nn.Module):
    """The student with the attention window of a step: what runs over the ranks, by DDP or FSDP2."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        assert isinstance(student, nn.Module)  # as RadioModel makes sure
        self.student = student

    def forward(self, images: Tensor, drawn: Tensor | None, window: int | None) -> Features:
        """The features of [B, 3, h, w] RGB in [0, 1]; a window of None keeps the student's own."""
        student: Student = self.student
        if window is not None:
            assert isinstance(student, Windowed)  # as window_candidates makes sure
            student = student.with_window(window)
        return student(images, drawn)


class Distiller(nn.Module):
    """The student with the adaptors that live on this rank, and what their teachers ask of it.

    Args:
        model: student and adaptors.
        teachers: each one's weights in the loss.
        loss: alpha, beta and knee of eq. 3.
        balancer: weighs the losses against one another; None = the declared weights alone do.
    """

    def __init__(
        self,
        model: RadioModel,
        teachers: Sequence[TeacherConfig],
        loss: LossConfig,
        balancer: Balancer | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.balancer: Balancer = Naive(teachers) if balancer is None else balancer

    def forward(self, encode: Encode, part: Part, window: int | None, detail: bool) -> Losses:
        """The weighted losses of one part, the mean over its pictures.

        Args:
            encode: the student's forward, over the ranks where there are several.
            part: pictures of one group, and its teachers' features of them.
            window: the attention window of this step; None keeps the student's own.
            detail: also compute the centred cosines that only the log shows.
        """
        lesson, side = part.lesson, part.lesson.group.side
        view = encode(resize_images(lesson.images, (side, side)), part.drawn, window)
        parts: dict[str, Tensor] = {}
        details: dict[str, Tensor] = {}
        losses: dict[str, TeacherLosses] = {}
        for name in lesson.group.teachers:
            target = lesson.targets[name]
            adapted = self.model.adapt(name, view, target.grid)
            losses[name] = teacher_losses(adapted, target, self.loss)
            parts[f"{name}/summary"] = losses[name].summary.detach().mean()
            parts[f"{name}/spatial"] = losses[name].spatial.detach().mean()
            if detail:
                details[f"{name}/centred_cosine"] = centred_cosine(adapted.tokens, target.tokens)
        balanced: Balanced = self.balancer(view, losses)
        return Losses(balanced.total, {**parts, **balanced.weights}, details)

    def settle(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Let the balancer take in a finished step.

        Args:
            mean: the elementwise mean over the ranks that shared the step's pictures.
        """
        if isinstance(self.balancer, AdaLoss):
            self.balancer.settle(mean)


def teacher_features(
    teachers: Mapping[str, Teacher], sizes: Mapping[str, tuple[int, int]], images: Tensor
) -> dict[str, Features]:
    """Each teacher's features at its own resolution."""
    return {name: teacher(resize_images(images, sizes[name])) for name, teacher in teachers.items()}


def in_parts(lesson: Lesson, drawn: Tensor | None, count: int) -> list[Part]:
    """A lesson in `count` equal parts, one after another."""
    if count == 1:
        return [Part(lesson, drawn)]
    size = lesson.images.shape[0] // count
    parts = []
    for first in range(0, count * size, size):
        rows = slice(first, first + size)
        targets = {
            name: Features(known.summary[rows], known.tokens[rows], known.grid)
            for name, known in lesson.targets.items()
        }
        part = Lesson(lesson.group, lesson.images[rows], targets)
        parts.append(Part(part, None if drawn is None else drawn[rows]))
    return parts

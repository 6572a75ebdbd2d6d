"""Forward and losses of one group's pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from radio.model import RadioModel
from radio.resample import resize_images
from radio.types import Features, Student, Teacher, Windowed

from .batches import Lesson
from .config import LossConfig, TeacherConfig
from .losses import centred_cosine, teacher_losses

# Letters: B batch, h w pixels.

Encode = Callable[[Tensor, Tensor | None, int | None], Features]


class Losses(NamedTuple):
    """The losses of one lesson; `parts` stay on the device until the log step."""

    total: Tensor  # []
    parts: dict[str, Tensor]  # "clip/summary", "clip/spatial": [] each, unweighted
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
    """

    def __init__(self, model: RadioModel, teachers: Sequence[TeacherConfig], loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.teachers = {teacher.name: teacher for teacher in teachers}
        self.loss = loss

    def forward(
        self, encode: Encode, lesson: Lesson, drawn: Tensor | None, window: int | None, detail: bool
    ) -> Losses:
        """The weighted losses of one lesson, the mean over its pictures.

        Args:
            encode: the student's forward, over the ranks where there are several.
            lesson: pictures of one group, and its teachers' features of them.
            drawn: what the student draws at random, see `Student.draw`.
            window: the attention window of this step; None keeps the student's own.
            detail: also compute the centred cosines that only the log shows.
        """
        side = lesson.group.side
        view = encode(resize_images(lesson.images, (side, side)), drawn, window)
        parts: dict[str, Tensor] = {}
        details: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        for name in lesson.group.teachers:
            teacher, target = self.teachers[name], lesson.targets[name]
            adapted = self.model.adapt(name, view, target.grid)
            losses = teacher_losses(adapted, target, self.loss)
            terms += [teacher.summary_weight * losses.summary, teacher.spatial_weight * losses.spatial]
            parts[f"{name}/summary"] = losses.summary.detach()
            parts[f"{name}/spatial"] = losses.spatial.detach()
            if detail:
                details[f"{name}/centred_cosine"] = centred_cosine(adapted.tokens, target.tokens)
        return Losses(torch.stack(terms).sum(), parts, details)


def teacher_features(
    teachers: Mapping[str, Teacher], sizes: Mapping[str, tuple[int, int]], images: Tensor
) -> dict[str, Features]:
    """Each teacher's features at its own resolution."""
    return {name: teacher(resize_images(images, sizes[name])) for name, teacher in teachers.items()}


def in_parts(lesson: Lesson, drawn: Tensor | None, count: int) -> list[tuple[Lesson, Tensor | None]]:
    """A lesson in `count` equal parts, one after another."""
    if count == 1:
        return [(lesson, drawn)]
    size = lesson.images.shape[0] // count
    parts: list[tuple[Lesson, Tensor | None]] = []
    for first in range(0, count * size, size):
        rows = slice(first, first + size)
        targets = {
            name: Features(known.summary[rows], known.tokens[rows], known.grid)
            for name, known in lesson.targets.items()
        }
        part = Lesson(lesson.group, lesson.images[rows], targets)
        parts.append((part, None if drawn is None else drawn[rows]))
    return parts

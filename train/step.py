"""Forward and losses of one group's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from radio.model import RadioModel
from radio.resample import resize_images
from radio.types import Features, Student, Teacher

from .balancing import AdaLoss, Balanced, Balancer, Naive
from .batches import GroupBatch
from .config import LossConfig, TeacherConfig
from .losses import TeacherLosses, centred_cosine, teacher_losses

# Letters: B batch, h w pixels.

Encode = Callable[[Tensor, Tensor | None, int | None], Features]


class Part(NamedTuple):
    """The input of one forward."""

    lesson: GroupBatch
    crops: Tensor | None  # random position crops of its images, see `Student.sample_crops`


class Losses(NamedTuple):
    """The losses of one part; `parts` stay on the device until the log step."""

    total: Tensor  # []
    parts: dict[str, Tensor]  # "clip/summary", "clip/spatial": [] each, unweighted; learned weights
    details: dict[str, Tensor]  # "clip/centred_cosine": [] each, if requested


class StudentPass(nn.Module):
    """The student with the attention window of a step: the module that DDP or FSDP2 wraps."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        assert isinstance(student, nn.Module)  # as RadioModel makes sure
        self.student = student

    def forward(self, images: Tensor, crops: Tensor | None, window: int | None) -> Features:
        """Compute features of [B, 3, h, w] RGB in [0, 1]; None keeps the student's own window."""
        student: Student = self.student
        if window is not None:
            assert student.with_window is not None  # as window_candidates makes sure
            student = student.with_window(window)
        return student(images, crops)


class DistillationLoss(nn.Module):
    """The student with this rank's adaptors, and the losses against their teachers.

    Args:
        model: student and adaptors.
        teachers: the teachers with their loss weights.
        loss: alpha, beta and smooth L1's threshold of eq. 3.
        balancer: weighs the losses against one another; None = the declared weights only.
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
        """Compute the weighted losses of one part, the mean over its images.

        Args:
            encode: the student's forward, distributed with several ranks.
            part: images of one group with its teachers' features.
            window: the attention window of this step; None keeps the student's own.
            detail: also compute the centred cosines, which are only logged.
        """
        lesson, side = part.lesson, part.lesson.group.side
        view = encode(resize_images(lesson.images, (side, side)), part.crops, window)
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

    def update(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Update the balancer after a step.

        Args:
            mean: the elementwise mean over the ranks that shared the step's images.
        """
        if isinstance(self.balancer, AdaLoss):
            self.balancer.update(mean)


def teacher_features(
    teachers: Mapping[str, Teacher], sizes: Mapping[str, tuple[int, int]], images: Tensor
) -> dict[str, Features]:
    """Compute each teacher's features at its own resolution."""
    return {name: teacher(resize_images(images, sizes[name])) for name, teacher in teachers.items()}


def in_parts(lesson: GroupBatch, crops: Tensor | None, count: int) -> list[Part]:
    """Split a batch into `count` equal parts, in order."""
    if count == 1:
        return [Part(lesson, crops)]
    size = lesson.images.shape[0] // count
    parts = []
    for first in range(0, count * size, size):
        rows = slice(first, first + size)
        targets = {
            name: Features(known.summary[rows], known.tokens[rows], known.grid)
            for name, known in lesson.targets.items()
        }
        part = GroupBatch(lesson.group, lesson.images[rows], targets)
        parts.append(Part(part, None if crops is None else crops[rows]))
    return parts

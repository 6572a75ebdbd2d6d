"""Forward, losses and what is logged of one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from radio.model import RadioModel
from radio.resample import resize_images
from radio.types import Features, Teacher

from .config import LossConfig, TeacherConfig
from .losses import centred_cosine, teacher_losses

# Letters: B batch, h w pixels.


class Losses(NamedTuple):
    """The losses of one step; `parts` stay on the device until the log step."""

    total: Tensor  # []
    parts: dict[str, Tensor]  # "clip/summary", "clip/spatial": [] each, unweighted


class Distiller(nn.Module):
    """The student with its adaptors and losses: what DDP wraps, one forward a step.

    Args:
        model: student and adaptors.
        teachers: each one's weights in the loss.
        loss: alpha, beta and knee of eq. 3.
        resolutions: the student's input side beside each teacher.
    """

    def __init__(
        self,
        model: RadioModel,
        teachers: Sequence[TeacherConfig],
        loss: LossConfig,
        resolutions: dict[str, int],
    ) -> None:
        super().__init__()
        self.model = model
        self.teachers = tuple(teachers)
        self.loss = loss
        self.resolutions = resolutions

    def forward(
        self,
        images: Tensor,
        targets: dict[str, Features],
        drawn: Tensor | None,
        windows: dict[int, int | None],
        detail: bool,
    ) -> Losses:
        """The losses of [B, 3, h, w] RGB in [0, 1] against every teacher's features.

        Args:
            images: the crops that the teachers saw.
            targets: their features, by teacher name.
            drawn: what the student draws at random, see `Student.draw`.
            windows: the attention window of this step at each resolution; None keeps the student's own.
            detail: also compute the centred cosines that only the log shows.
        """
        model = self.model
        views = {}
        for side, window in windows.items():
            student = model if window is None else model.with_window(window)
            views[side] = student(resize_images(images, (side, side)), drawn)
        parts: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        for teacher in self.teachers:
            target = targets[teacher.name]
            adapted = model.adapt(teacher.name, views[self.resolutions[teacher.name]], target.grid)
            losses = teacher_losses(adapted, target, self.loss)
            terms += [teacher.summary_weight * losses.summary, teacher.spatial_weight * losses.spatial]
            parts[f"{teacher.name}/summary"] = losses.summary.detach()
            parts[f"{teacher.name}/spatial"] = losses.spatial.detach()
            if detail:
                parts[f"{teacher.name}/centred_cosine"] = centred_cosine(adapted.tokens, target.tokens)
        return Losses(torch.stack(terms).sum(), parts)


def teacher_features(
    teachers: Mapping[str, Teacher], sizes: Mapping[str, tuple[int, int]], images: Tensor
) -> dict[str, Features]:
    """Every teacher's features of the same crops, each at its own resolution; no gradients."""
    return {name: teacher(resize_images(images, sizes[name])) for name, teacher in teachers.items()}

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
            targets: their features, by teacher name, of the pictures that each one sees.
            drawn: what the student draws at random, see `Student.draw`.
            windows: the attention window of this step at each resolution; None keeps the student's own.
            detail: also compute the centred cosines that only the log shows.
        """
        model = self.model
        views: dict[tuple[int, int], Features] = {}
        for side, every in dict.fromkeys((self.resolutions[t.name], t.every) for t in self.teachers):
            window = windows[side]
            student = model if window is None else model.with_window(window)
            seen = resize_images(images[::every], (side, side))
            views[side, every] = student(seen, None if drawn is None else drawn[::every])
        parts: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        for teacher in self.teachers:
            target = targets[teacher.name]
            view = views[self.resolutions[teacher.name], teacher.every]
            adapted = model.adapt(teacher.name, view, target.grid)
            losses = teacher_losses(adapted, target, self.loss)
            terms += [teacher.summary_weight * losses.summary, teacher.spatial_weight * losses.spatial]
            parts[f"{teacher.name}/summary"] = losses.summary.detach()
            parts[f"{teacher.name}/spatial"] = losses.spatial.detach()
            if detail:
                parts[f"{teacher.name}/centred_cosine"] = centred_cosine(adapted.tokens, target.tokens)
        return Losses(torch.stack(terms).sum(), parts)


def teacher_features(
    teachers: Mapping[str, Teacher],
    sizes: Mapping[str, tuple[int, int]],
    images: Tensor,
    every: Mapping[str, int] | None = None,
) -> dict[str, Features]:
    """Each teacher's features at its own resolution, of one in `every` crops (all unless given)."""
    steps = every or dict.fromkeys(teachers, 1)
    return {
        name: teacher(resize_images(images[:: steps[name]], sizes[name]))
        for name, teacher in teachers.items()
    }


def thinned(features: Features, every: int) -> Features:
    """The features of one in `every` pictures."""
    return Features(features.summary[::every], features.tokens[::every], features.grid)

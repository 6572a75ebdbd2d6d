"""The distillation losses of eq. 2 and 3, in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from radio.types import Features

from .config import LossConfig

# Letters: B batch, T tokens, D width.


class TeacherLosses(NamedTuple):
    """One teacher's losses for every image, unweighted."""

    summary: Tensor  # [B] eq. 2, in [0, 2]
    spatial: Tensor  # [B] eq. 3, mean over the tokens


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute 1 - cos(a, b) along the last axis (eq. 2): [..., D] -> [...] in [0, 2]; 1 for zero vectors."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1)


def summary_losses(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute L_cos of the summaries (eq. 2): [B, C] -> [B]."""
    return cosine_distance(student, teacher)


def spatial_losses(student: Tensor, teacher: Tensor, config: LossConfig) -> Tensor:
    """Compute alpha * L_cos + beta * smooth L1 (eq. 3), mean over an image's tokens: [B, T, D] -> [B]."""
    matched = cosine_distance(student, teacher).mean(1)
    sized = F.smooth_l1_loss(student.float(), teacher.float(), beta=config.smooth_l1_beta, reduction="none")
    return config.cosine * matched + config.smooth_l1 * sized.mean((1, 2))


def teacher_losses(student: Features, teacher: Features, config: LossConfig) -> TeacherLosses:
    """Compute both losses of adapted student features against one teacher's, on the teacher's grid."""
    return TeacherLosses(
        summary_losses(student.summary, teacher.summary),
        spatial_losses(student.tokens, teacher.tokens, config),
    )


@torch.no_grad()
def centred_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean cosine of the tokens after subtracting the teacher's mean token: [], in [-1, 1].

    Patch tokens share a large constant part; this measures what is learned beyond it.
    """
    centre = teacher.float().mean(dim=(0, 1))
    return F.cosine_similarity(student.float() - centre, teacher.float() - centre, dim=-1).mean()

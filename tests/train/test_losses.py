"""The losses of eq. 2 and 3 against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radio.types import Features
from train.config import LossConfig
from train.losses import centred_cosine, cosine_distance, spatial_losses, summary_losses, teacher_losses

ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1.0, 0.0], [5.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 3.0], 1.0),
        ([1.0, 0.0], [-2.0, 0.0], 2.0),
        ([1.0, 0.0], [1.0, 1.0], 1 - ROOT),
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([0.0, 0.0], [1.0, 1.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
    ],
)
def test_cosine_distance(a: list[float], b: list[float], wanted: float) -> None:
    assert cosine_distance(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(wanted, abs=1e-6)


def test_every_image_has_a_summary_loss() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 7.0], [1.0, 1.0]])
    assert cosine_distance(student, teacher).tolist() == pytest.approx([0, 1, 1 - ROOT])


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("cosine", lambda a, b: nn.CosineEmbeddingLoss()(a, b, torch.ones(len(a)))),
        ("l1", nn.L1Loss()),
        ("mse", nn.MSELoss()),
        ("smooth-l1", nn.SmoothL1Loss(beta=0.7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summary_losses_are_torchs_own(kind: Any, reference: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 5, 16, generator=generator).to(dtype)
    features = [Features(summary, torch.ones(5, 1, 2), (1, 1)) for summary in (student, teacher)]
    losses = teacher_losses(*features, LossConfig(summary=kind, smooth_l1_beta=0.7)).summary
    assert losses.shape == (5,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), reference(student.float(), teacher.float()))
    alone = summary_losses(student[2:3], teacher[2:3], LossConfig(summary=kind, smooth_l1_beta=0.7))
    torch.testing.assert_close(alone, losses[2:3])
    assert losses.sum() > 0.1


def by_hand(student: Tensor, teacher: Tensor, alpha: float, beta: float, knee: float) -> float:
    """Eq. 3, one token and one channel at a time."""
    total = 0.0
    for a, b in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosine = dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
        smooth = [gap**2 / (2 * knee) if gap < knee else gap - knee / 2 for gap in gaps]
        total += alpha * (1 - cosine) + beta * sum(smooth) / len(smooth)
    return total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize(
    "settings", [LossConfig(), LossConfig(cosine=0.2, smooth_l1=3.0, smooth_l1_beta=2.0)]
)
def test_spatial_loss_is_eq_3(settings: LossConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(2, 3, 5, generator=generator)
    teacher = 2 * torch.randn(2, 3, 5, generator=generator)
    wanted = by_hand(student, teacher, settings.cosine, settings.smooth_l1, settings.smooth_l1_beta)
    losses = spatial_losses(student, teacher, settings)
    assert losses.mean().item() == pytest.approx(wanted, rel=1e-5)
    for image, loss in enumerate(losses.tolist()):
        alone = by_hand(
            student[image, None],
            teacher[image, None],
            settings.cosine,
            settings.smooth_l1,
            settings.smooth_l1_beta,
        )
        assert loss == pytest.approx(alone, rel=1e-5)


def test_the_mean_over_images_is_the_mean_over_all_tokens() -> None:
    """Eq. 3 averages over tokens, and every image has as many."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    settings = LossConfig(smooth_l1_beta=0.5)
    cosine = cosine_distance(student, teacher).double().mean()
    sized = torch.nn.functional.smooth_l1_loss(student.float(), teacher.float(), beta=0.5)
    wanted = 0.9 * cosine.item() + 0.1 * sized.item()
    assert spatial_losses(student, teacher, settings).mean().item() == pytest.approx(wanted, rel=1e-6)


def test_spatial_loss_has_the_papers_alpha_and_beta() -> None:
    # One token at a right angle: cosine distance 1; gaps 2 and 0.5: 1.5 and 0.125, mean 0.8125.
    loss = spatial_losses(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 0.5]]]), LossConfig())
    assert loss.item() == pytest.approx(0.9 * 1 + 0.1 * 0.8125)


def test_the_knee_parts_square_from_line() -> None:
    gap = torch.tensor([[[1.5]]]), torch.tensor([[[0.0]]])
    only = {"cosine": 0.0, "smooth_l1": 1.0}
    assert spatial_losses(*gap, LossConfig(**only, smooth_l1_beta=1.0)).item() == pytest.approx(1.0)
    assert spatial_losses(*gap, LossConfig(**only, smooth_l1_beta=2.0)).item() == pytest.approx(1.5**2 / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    summaries = torch.randn(2, 4, 8, generator=generator).to(dtype)
    tokens = torch.randn(2, 4, 6, 8, generator=generator).to(dtype)
    low = [Features(summaries[i], tokens[i], (2, 3)) for i in range(2)]
    high = [Features(f.summary.float(), f.tokens.float(), f.grid) for f in low]
    given, wanted = (teacher_losses(a, b, LossConfig()) for a, b in (low, high))
    assert given.summary.dtype == given.spatial.dtype == torch.float32
    assert torch.equal(given.summary, wanted.summary)
    assert torch.equal(given.spatial, wanted.spatial)


@pytest.mark.parametrize("student", [torch.zeros(1, 2, 3), torch.full((1, 2, 3), 1e-20), torch.ones(1, 2, 3)])
def test_gradients_are_finite(student: Tensor) -> None:
    tokens = student.clone().requires_grad_()
    teacher = torch.tensor([[[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]]])
    loss = spatial_losses(tokens, teacher, LossConfig()) + cosine_distance(tokens[:, 0], teacher[:, 0])
    loss.sum().backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


def test_centred_cosine_sees_past_the_mean_token() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher = 10 + torch.randn(3, 5, 16, generator=generator)
    constant = teacher.mean(dim=(0, 1)).expand_as(teacher)
    assert centred_cosine(teacher, teacher).item() == pytest.approx(1.0, abs=1e-5)
    assert cosine_distance(constant, teacher).mean().item() < 0.01  # the plain one is content with the mean
    assert abs(centred_cosine(constant + 1e-3, teacher).item()) < 0.5

"""One batch: every teacher's losses on its own grid, weighted and summed, with gradients everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.ops import resize_images
from radio.types import Features, Teacher
from train.config import LossConfig, TeacherConfig
from train.data.loader import GroupBatch, for_student
from train.distributed import StudentPass
from train.groups import TeacherGroup
from train.losses import DistillationLoss, Losses, teacher_losses
from train.setup import teacher_features

from .conftest import TEACHERS
from .tiny_teachers import tiny

SIZES = {"clip": (50, 50), "dense": (64, 64), "sam": (108, 108)}


@pytest.fixture(scope="module")
def teachers() -> dict[str, Teacher]:
    return {name: tiny(name, None) for name in SIZES}


@pytest.fixture
def model(teachers: dict[str, Teacher]) -> RadioModel:
    adaptors = tuple(
        AdaptorConfig(name=name, summary_dim=teacher.summary_dim, token_dim=teacher.token_dim)
        for name, teacher in teachers.items()
    )
    return build(ModelConfig(student="vit-tiny12", adaptors=adaptors), 0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 108, 108, generator=torch.Generator().manual_seed(0))


def batch_of(teachers: dict[str, Teacher], images: Tensor, side: int = 48) -> GroupBatch:
    """What these teachers say of these images, for a student that sees them at this side."""
    group = TeacherGroup(
        teachers=tuple(teachers),
        adaptors=tuple(teachers),
        sides=(side,),
        batch_size=len(images),
        first=0,
        ranks=(0,),
    )
    return GroupBatch(group, for_student(images, side), teacher_features(teachers, SIZES, images))


def losses_of(
    loss: DistillationLoss,
    batch: GroupBatch,
    crops: Tensor | None = None,
    window: int | None = None,
    *,
    detail: bool = False,
) -> Losses:
    batch = batch._replace(crops=crops)
    found: Losses = loss(StudentPass(loss.model.student), batch, window, detail)
    return found


def test_every_teacher_sees_the_crop_at_its_own_size(teachers: dict[str, Teacher], images: Tensor) -> None:
    features = teacher_features(teachers, SIZES, images)
    assert {name: found.grid for name, found in features.items()} == {
        "clip": (5, 5),
        "dense": (4, 4),
        "sam": (6, 6),
    }
    wanted = teachers["clip"](resize_images(images, (50, 50)))
    assert torch.equal(features["clip"].tokens, wanted.tokens)
    assert torch.equal(features["sam"].summary, teachers["sam"](images).summary)
    assert all(not found.tokens.requires_grad for found in features.values())


@pytest.mark.parametrize("side", [48, 72])
def test_the_loss_is_the_weighted_sum(
    model: RadioModel, teachers: dict[str, Teacher], images: Tensor, side: int
) -> None:
    chosen = (replace(TEACHERS[0], summary_weight=0.5, spatial_weight=2.0), *TEACHERS[1:])
    batch = batch_of(teachers, images, side)
    losses = losses_of(DistillationLoss(model, chosen, LossConfig()), batch)
    weights = {"clip": (0.5, 2.0), "dense": (1.0, 1.0), "sam": (0.0, 1.0)}
    total = 0.0
    for name, (summary_weight, spatial_weight) in weights.items():
        view, target = model(resize_images(images, (side, side))), batch.targets[name]
        parts = teacher_losses(model.adapt(name, view, target.grid), target, LossConfig())
        assert losses.parts[f"{name}/summary"] == pytest.approx(parts.summary.mean().item(), rel=1e-6)
        assert losses.parts[f"{name}/spatial"] == pytest.approx(parts.spatial.mean().item(), rel=1e-6)
        total += summary_weight * parts.summary.mean().item() + spatial_weight * parts.spatial.mean().item()
    assert losses.total.item() == pytest.approx(total, rel=1e-6)
    assert set(losses.parts) == {f"{name}/{kind}" for name in weights for kind in ("summary", "spatial")}


def test_only_the_batchs_own_teachers_are_asked(
    model: RadioModel, teachers: dict[str, Teacher], images: Tensor
) -> None:
    del model.adaptors["sam"]
    two = {name: teachers[name] for name in ("clip", "dense")}
    losses = losses_of(DistillationLoss(model, TEACHERS, LossConfig()), batch_of(two, images))
    assert {name.partition("/")[0] for name in losses.parts} == {"clip", "dense"}


def test_gradients_are_finite_everywhere_and_sams_summary_head_gets_none(
    model: RadioModel, teachers: dict[str, Teacher], images: Tensor
) -> None:
    loss = DistillationLoss(model, TEACHERS, LossConfig())
    crops = model.sample_crops(4, torch.Generator().manual_seed(1))
    losses_of(loss, batch_of(teachers, images), crops, detail=True).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert bool((parameter.grad == 0).all()) == name.startswith("adaptors.sam.summary."), name


def test_details_are_computed_only_when_asked_for(
    model: RadioModel, teachers: dict[str, Teacher], images: Tensor
) -> None:
    loss, batch = DistillationLoss(model, TEACHERS, LossConfig()), batch_of(teachers, images)
    plain, detailed = losses_of(loss, batch), losses_of(loss, batch, detail=True)
    assert torch.equal(plain.total, detailed.total)
    assert plain.details == {}
    kinds = ("centred_cosine", "unexplained")
    assert set(detailed.details) == {f"{name}/{kind}" for name in SIZES for kind in kinds}
    assert all(not part.requires_grad for part in (*detailed.parts.values(), *detailed.details.values()))


def test_the_gradients_of_the_parts_of_a_batch_are_those_of_the_whole(
    model: RadioModel, teachers: dict[str, Teacher], images: Tensor
) -> None:
    loss, batch = DistillationLoss(model, TEACHERS, LossConfig()), batch_of(teachers, images)
    crops = model.sample_crops(4, torch.Generator().manual_seed(1))
    losses_of(loss, batch, crops).total.backward()
    whole = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    parts = batch._replace(crops=crops).split(2)
    assert [len(part.images) for part in parts] == [2, 2]
    for part in parts:
        (losses_of(loss, part, part.crops).total / 2).backward()
    for wanted, parameter in zip(whole, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_the_window_of_the_step(teachers: dict[str, Teacher], images: Tensor) -> None:
    adaptors = (AdaptorConfig(name="clip", summary_dim=12, token_dim=24),)
    model = build(ModelConfig(student="vitdet-tiny12", adaptors=adaptors), 0)
    loss = DistillationLoss(model, (TeacherConfig(name="clip", model="tiny:clip"),), LossConfig())
    batch = batch_of({"clip": teachers["clip"]}, images, 96)
    spatial = {
        window: losses_of(loss, batch, None, window).parts["clip/spatial"].item() for window in (2, 4, None)
    }
    view: Features = model.with_window(2)(resize_images(images, (96, 96)))
    target = batch.targets["clip"]
    by_hand = teacher_losses(model.adapt("clip", view, (5, 5)), target, LossConfig())
    assert spatial[2] == pytest.approx(by_hand.spatial.mean().item(), rel=1e-6)
    assert spatial[None] == spatial[4] != spatial[2]  # the student's own window is 4

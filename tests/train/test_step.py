"""One step: every teacher's losses on its own grid, weighted and summed, with gradients everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from radio.adaptors import AdaptorConfig
from radio.model import ModelConfig, RadioModel, build
from radio.resample import resize_images
from radio.types import Features, Teacher
from train.config import LossConfig, TeacherConfig
from train.losses import teacher_losses
from train.step import Distiller, teacher_features, thinned

from .conftest import TEACHERS
from .tiny_teachers import tiny

SIZES = {"clip": (50, 50), "dense": (64, 64), "sam": (108, 108)}
SIDES = {"clip": 48, "dense": 48, "sam": 72}
WINDOWS: dict[int, int | None] = {48: None, 72: None}


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
def images() -> torch.Tensor:
    return torch.rand(3, 3, 108, 108, generator=torch.Generator().manual_seed(0))


def test_every_teacher_sees_the_crop_at_its_own_size(
    teachers: dict[str, Teacher], images: torch.Tensor
) -> None:
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


def test_the_loss_is_the_weighted_sum(
    model: RadioModel, teachers: dict[str, Teacher], images: torch.Tensor
) -> None:
    chosen = (replace(TEACHERS[0], summary_weight=0.5, spatial_weight=2.0), *TEACHERS[1:])
    distiller = Distiller(model, chosen, LossConfig(), SIDES)
    targets = teacher_features(teachers, SIZES, images)
    losses = distiller(images, targets, None, WINDOWS, False)
    weights = {"clip": (0.5, 2.0), "dense": (1.0, 1.0), "sam": (0.0, 1.0)}
    total = 0.0
    for name, (summary_weight, spatial_weight) in weights.items():
        view = model(resize_images(images, (SIDES[name], SIDES[name])))
        parts = teacher_losses(model.adapt(name, view, targets[name].grid), targets[name], LossConfig())
        assert losses.parts[f"{name}/summary"] == pytest.approx(parts.summary.item(), rel=1e-6)
        assert losses.parts[f"{name}/spatial"] == pytest.approx(parts.spatial.item(), rel=1e-6)
        total += summary_weight * parts.summary.item() + spatial_weight * parts.spatial.item()
    assert losses.total.item() == pytest.approx(total, rel=1e-6)
    assert set(losses.parts) == {f"{name}/{kind}" for name in weights for kind in ("summary", "spatial")}


def test_a_dear_teacher_sees_one_in_so_many(
    model: RadioModel, teachers: dict[str, Teacher], images: torch.Tensor
) -> None:
    """As if SAM had been asked about these pictures alone, at its own resolution and with their own draws."""
    chosen = (*TEACHERS[:2], replace(TEACHERS[2], every=2))
    targets = teacher_features(teachers, SIZES, images, {"clip": 1, "dense": 1, "sam": 2})
    assert targets["sam"].tokens.shape[0] == 2 and targets["clip"].tokens.shape[0] == 3
    whole = teacher_features(teachers, SIZES, images)
    assert torch.equal(thinned(whole["sam"], 2).tokens, targets["sam"].tokens)
    drawn = model.draw(3, torch.Generator().manual_seed(1))
    losses = Distiller(model, chosen, LossConfig(), SIDES)(images, targets, drawn, WINDOWS, False)
    all_see = Distiller(model, TEACHERS, LossConfig(), SIDES)(images, whole, drawn, WINDOWS, False)
    assert losses.parts["clip/spatial"] == all_see.parts["clip/spatial"]
    view = model(resize_images(images[[0, 2]], (SIDES["sam"], SIDES["sam"])), drawn[[0, 2]])
    parts = teacher_losses(model.adapt("sam", view, targets["sam"].grid), targets["sam"], LossConfig())
    assert losses.parts["sam/spatial"] == pytest.approx(parts.spatial.item(), rel=1e-6)


def test_gradients_are_finite_everywhere_and_sams_summary_head_gets_none(
    model: RadioModel, teachers: dict[str, Teacher], images: torch.Tensor
) -> None:
    distiller = Distiller(model, TEACHERS, LossConfig(), SIDES)
    drawn = model.draw(3, torch.Generator().manual_seed(1))
    distiller(images, teacher_features(teachers, SIZES, images), drawn, WINDOWS, True).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert bool((parameter.grad == 0).all()) == name.startswith("adaptors.sam.summary."), name


def test_details_are_computed_only_when_asked_for(
    model: RadioModel, teachers: dict[str, Teacher], images: torch.Tensor
) -> None:
    distiller = Distiller(model, TEACHERS, LossConfig(), SIDES)
    targets = teacher_features(teachers, SIZES, images)
    plain = distiller(images, targets, None, WINDOWS, False)
    detailed = distiller(images, targets, None, WINDOWS, True)
    assert torch.equal(plain.total, detailed.total)
    assert set(detailed.parts) - set(plain.parts) == {f"{name}/centred_cosine" for name in SIZES}
    assert all(not part.requires_grad for part in detailed.parts.values())


def test_windows_are_chosen_for_each_resolution(teachers: dict[str, Teacher], images: torch.Tensor) -> None:
    adaptors = (AdaptorConfig(name="clip", summary_dim=12, token_dim=24),)
    model = build(ModelConfig(student="vitdet-tiny12", adaptors=adaptors), 0)
    distiller = Distiller(model, (TeacherConfig(name="clip", model="tiny:clip"),), LossConfig(), {"clip": 96})
    targets = teacher_features({"clip": teachers["clip"]}, SIZES, images)
    spatial = {
        window: distiller(images, targets, None, {96: window}, False).parts["clip/spatial"].item()
        for window in (2, 4, None)
    }
    view: Features = model.with_window(2)(resize_images(images, (96, 96)))
    by_hand = teacher_losses(model.adapt("clip", view, (5, 5)), targets["clip"], LossConfig())
    assert spatial[2] == pytest.approx(by_hand.spatial.item(), rel=1e-6)
    assert spatial[None] == spatial[4] != spatial[2]  # the student's own window is 4

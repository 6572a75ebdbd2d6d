"""Scenes teachers with one known flaw: its size, and that all else is the plain teacher's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from radio.hub import load_teacher
from radio.scenes import render_images
from radio.teachers.scene_variants import CLIP_FACTOR, SAM_FACTOR, STRENGTH, VARIANTS, fixed_pattern
from radio.types import Teacher


def images_for(teacher: Teacher, count: int = 2) -> Tensor:
    pixels, _ = render_images(range(count), split="val", size=teacher.native_size[0])
    return torch.from_numpy(pixels).float() / 255


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_teacher_of_its_own_that_a_spec_names(name: str) -> None:
    variant, plain = load_teacher(f"scenes:{name}"), load_teacher(f"scenes:{VARIANTS[name].plain}")
    assert variant.name == f"scenes:{name}"
    assert variant.fingerprint == load_teacher(f"scenes:{name}").fingerprint != plain.fingerprint
    for fact in ("native_size", "patch_size", "fixed_size", "summary_dim", "token_dim", "num_blocks"):
        assert getattr(variant, fact) == getattr(plain, fact)
    assert isinstance(variant, torch.nn.Module)
    assert not any(weight.requires_grad for weight in variant.parameters())
    assert not any(module.training for module in variant.modules())
    images = images_for(variant)
    assert variant.intermediate is not None
    torch.testing.assert_close(variant.intermediate(images, [3])[0].tokens, variant(images).tokens)
    outline = load_teacher(f"scenes:{name}", meta=True)(images.to("meta"))
    assert outline.tokens.shape == variant(images).tokens.shape


@pytest.mark.parametrize(
    ("name", "factor", "deviation"), [("clip", CLIP_FACTOR, 0.0286), ("sam", SAM_FACTOR, 5.4688)]
)
def test_scaled_tokens_deviate_as_published_ones(name: str, factor: float, deviation: float) -> None:
    variant, plain = load_teacher(f"scenes:{name}-scaled"), load_teacher(f"scenes:{name}")
    images = images_for(plain, 24)
    scaled, features = variant(images), plain(images)
    torch.testing.assert_close(scaled.tokens, features.tokens * factor)
    assert float(scaled.tokens.std()) == pytest.approx(deviation, rel=0.02)
    if name == "sam":  # whose summary is the mean of its tokens
        torch.testing.assert_close(scaled.summary, scaled.tokens.mean(dim=1))
    else:
        assert torch.equal(scaled.summary, features.summary)


def test_the_text_tower_of_a_scaled_clip_is_the_plain_one() -> None:
    texts, plain = (load_teacher(f"scenes:{name}").text for name in ("clip-scaled", "clip"))
    assert texts is not None and plain is not None
    assert texts.fingerprint == plain.fingerprint


def test_the_neck_of_a_scaled_sam_reads_scaled_tokens() -> None:
    variant, plain = load_teacher("scenes:sam-scaled"), load_teacher("scenes:sam")
    images = images_for(plain, 1)
    necks = [teacher.sam.image_encoder.neck(teacher(images).map()) for teacher in (variant, plain)]
    torch.testing.assert_close(necks[0], necks[1], atol=1e-4, rtol=1e-4)


def test_noise_is_the_same_for_every_image_and_has_its_strength() -> None:
    noisy, clean = load_teacher("scenes:dense-noisy"), load_teacher("scenes:dense")
    images = images_for(clean, 24)
    features = clean(images)
    found = noisy(images).tokens - features.tokens
    pattern = fixed_pattern()
    torch.testing.assert_close(found, pattern.flatten(0, 1).expand_as(found), atol=1e-5, rtol=0)
    torch.testing.assert_close(pattern.mean(dim=(0, 1)), torch.zeros(128), atol=1e-6, rtol=0)
    centred = features.tokens - features.tokens.mean(dim=(0, 1))
    ratio = float(pattern.square().mean() / centred.square().mean())
    assert ratio == pytest.approx(STRENGTH**2, rel=0.05)
    assert torch.equal(noisy(images).summary, features.summary)


def test_a_larger_grid_repeats_the_pattern() -> None:
    noisy, clean = load_teacher("scenes:dense-noisy"), load_teacher("scenes:dense")
    images = torch.rand(1, 3, 132, 240)  # 11 x 20 tokens
    found = noisy(images).map() - clean(images).map()
    pattern = fixed_pattern().numpy()
    slow = np.empty((11, 20, 128), dtype=np.float32)
    for row in range(11):
        for column in range(20):
            slow[row, column] = pattern[row % 9, column % 9]
    torch.testing.assert_close(found[0].permute(1, 2, 0), torch.from_numpy(slow), atol=1e-5, rtol=0)

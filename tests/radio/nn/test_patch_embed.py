"""Stems: pixels to patch tokens."""

from __future__ import annotations

import pytest
import torch

from radio.errors import ConfigError
from radio.nn.vit import IMAGENET_MEAN, IMAGENET_STD, ConvStem, LinearStem, Normalise


def test_the_linear_stem_is_one_matrix_for_every_patch():
    torch.manual_seed(0)
    stem, images = LinearStem(5, 4), torch.rand(2, 3, 8, 12)
    weight = stem.proj.weight.flatten(1)
    wanted = [
        images[:, :, top : top + 4, left : left + 4].flatten(1) @ weight.T + stem.proj.bias
        for top in range(0, 8, 4)
        for left in range(0, 12, 4)
    ]
    torch.testing.assert_close(stem(images), torch.stack(wanted, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [2, 8, 12, 14, 16, 21, 25])
def test_the_convolutional_stem_makes_one_token_a_patch(patch):
    stem = ConvStem(24, patch)
    assert stem(torch.rand(2, 3, 2 * patch, 3 * patch)).shape == (2, 6, 24)


def test_its_tokens_are_row_major_and_local():
    torch.manual_seed(0)
    stem, images = ConvStem(16, 4).eval(), torch.rand(1, 3, 16, 24)
    touched = images.clone()
    touched[..., 9:11, 17:19] += 0.5  # inside patch (2, 4)
    moved = (stem(touched) - stem(images)).abs().sum(-1)[0]
    assert moved.argmax() == 2 * 6 + 4


def test_no_token_depends_on_what_else_is_in_the_batch():
    torch.manual_seed(0)
    stem, images = ConvStem(32, 12).train(), torch.rand(3, 3, 24, 24)
    alone = torch.cat([stem(image[None]) for image in images])
    torch.testing.assert_close(stem(images), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 11, 22, 26])
def test_a_patch_that_no_convolutions_make_is_an_error(patch):
    with pytest.raises(ConfigError, match=f"patches of {patch} px; use a product of 2, 3, 5 and 7"):
        ConvStem(32, patch)


def test_normalisation_is_by_channel_and_stays_out_of_the_state_dict():
    normalise, image = Normalise(), torch.rand(1, 3, 2, 2)
    for channel in range(3):
        wanted = (image[:, channel] - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(normalise(image)[:, channel], wanted)
    assert not normalise.state_dict()
    assert normalise.to(torch.bfloat16)(image).dtype == torch.bfloat16

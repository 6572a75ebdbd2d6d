"""Resampling of tokens and images, against a loop over pixels."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from radio.ops import resize_features, resize_images, resize_tokens, sample_tokens
from radio.types import Features, Positions, Sampling


@pytest.mark.parametrize("to", [(8, 8), (3, 5), (1, 1), (4, 6), (9, 2)])
def test_tokens_equal_the_loop(bilinear_by_loop, to):
    tokens = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    wanted = [bilinear_by_loop(one.unflatten(0, (4, 6)), to).flatten(0, 1) for one in tokens]
    torch.testing.assert_close(resize_tokens(tokens, (4, 6), to), torch.stack(wanted), rtol=0, atol=1e-6)


def test_the_same_grid_gives_the_same_tokens():
    tokens = torch.randn(1, 6, 3)
    assert resize_tokens(tokens, (2, 3), (2, 3)) is tokens


def sample_by_loop(tokens, grid, at):
    """Bilinear weights of the four neighbours of each position, one by one: [B, N, D]."""
    plane = tokens.unflatten(1, grid)
    found = []
    for y in (at.rows.first + at.rows.step * i for i in range(at.rows.length)):
        for x in (at.columns.first + at.columns.step * i for i in range(at.columns.length)):
            (top, down), (left, right) = ((math.floor(v), float(v - math.floor(v))) for v in (y, x))
            below, beyond = min(top + 1, grid[0] - 1), min(left + 1, grid[1] - 1)
            upper = plane[:, top, left] * (1 - right) + plane[:, top, beyond] * right
            lower = plane[:, below, left] * (1 - right) + plane[:, below, beyond] * right
            found.append(upper * (1 - down) + lower * down)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((0, 1, 4), (0, 1, 6)),
        ((1, 1, 3), (2, 1, 4)),
        ((Fraction(1, 3), Fraction(8, 7), 3), (Fraction(1, 2), Fraction(1, 2), 10)),
        ((1, 1, 2), (Fraction(2, 5), 1, 5)),
        ((3, Fraction(1, 2), 1), (5, 2, 1)),
    ],
)
def test_sampled_tokens_equal_the_loop(rows, columns):
    tokens = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    at = Sampling(
        *(Positions(Fraction(first), Fraction(step), count) for first, step, count in (rows, columns))
    )
    sampled = sample_tokens(tokens, (4, 6), at)
    torch.testing.assert_close(sampled, sample_by_loop(tokens, (4, 6), at), rtol=0, atol=2e-6)
    features = resize_features(Features(tokens[:, 0], tokens, (4, 6)), at)
    assert features.grid == at.grid and torch.equal(features.tokens, sampled)


def test_cut_out_tokens_are_those_that_sampling_would_find():
    tokens = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    whole, part = (Positions(Fraction(0), Fraction(1), 4), Positions(Fraction(1), Fraction(1), 4))
    almost = part._replace(first=part.first + Fraction(1, 10**9))
    cut = sample_tokens(tokens, (4, 6), Sampling(whole, part))
    assert torch.equal(cut, tokens.unflatten(1, (4, 6))[:, :, 1:5].flatten(1, 2))
    torch.testing.assert_close(cut, sample_tokens(tokens, (4, 6), Sampling(whole, almost)), rtol=0, atol=2e-6)


def test_half_precision_is_resampled_in_float32_and_given_back():
    tokens = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = resize_tokens(tokens.float(), (8, 8), (5, 5)).bfloat16()
    assert torch.equal(resize_tokens(tokens, (8, 8), (5, 5)), wanted)


def test_features_keep_their_summary():
    features = Features(torch.randn(2, 7), torch.randn(2, 6, 3), (2, 3))
    resized = resize_features(features, (4, 4))
    assert resized.summary is features.summary
    assert resized.grid == (4, 4) and resized.tokens.shape == (2, 16, 3)


def test_features_as_a_map_are_row_major():
    tokens = torch.arange(12.0).reshape(1, 6, 2)
    plane = Features(torch.zeros(1, 1), tokens, (2, 3)).map()
    assert plane.shape == (1, 2, 2, 3)
    assert torch.equal(plane[0, :, 1, 2], tokens[0, 5])


def test_images_enlarged_bilinearly_equal_the_loop(bilinear_by_loop):
    images = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted = bilinear_by_loop(images[0].permute(1, 2, 0), (8, 10)).permute(2, 0, 1)[None]
    torch.testing.assert_close(resize_images(images, (8, 10), "bilinear"), wanted, rtol=0, atol=1e-6)


def test_images_stay_in_range_and_shrink_antialiased():
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1.0
    shrunk = resize_images(stripes, (4, 4))
    assert shrunk.min() >= 0.0 and shrunk.max() <= 1.0
    assert (shrunk - 0.5).abs().max() < 0.1  # without antialiasing the stripes alias to near 0 or 1
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    enlarged = resize_images(edge, (32, 32))  # bicubic overshoots beside an edge
    assert enlarged.min() == 0.0 and enlarged.max() == 1.0


def test_images_of_the_right_size_are_left_alone():
    images = torch.rand(1, 3, 4, 4)
    assert resize_images(images, (4, 4)) is images

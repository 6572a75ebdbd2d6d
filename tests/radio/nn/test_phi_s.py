"""PHI-S by its invariants, and Hadamard matrices by their definition and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as scipys

from radio.nn.phi_s import FeatureNormaliser, FeatureStatistics, hadamard


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 64, 96, 128, 384, 768, 1152, 1280])
def test_matrices_of_known_sizes_are_hadamard(size: int) -> None:
    found = hadamard(size)
    assert torch.allclose(found.abs(), torch.full_like(found, size**-0.5))
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-9)


def test_powers_of_two_are_sylvesters() -> None:
    assert np.array_equal((hadamard(64) * 8).round().numpy(), scipys(64))


@pytest.mark.parametrize("size", [3, 6, 50])
def test_other_sizes_get_a_fixed_orthogonal_matrix(size: int) -> None:
    found = hadamard(size)
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(found, hadamard(size))


def _vectors(count: int = 3000, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(count, width, generator=generator) @ mixing.T + 3


@pytest.mark.parametrize("batch", [1, 7, 1000, 3000])
def test_statistics_do_not_depend_on_batches(batch: int) -> None:
    vectors, statistics = _vectors(), FeatureStatistics(12)
    for part in vectors.split(batch):
        statistics.update(part)
    assert statistics.count == len(vectors)
    torch.testing.assert_close(statistics.mean, vectors.double().mean(dim=0))
    torch.testing.assert_close(statistics.covariance, vectors.double().T.cov(correction=0))


def test_statistics_of_two_ranks_are_merged() -> None:
    vectors = _vectors()
    whole, first, second, empty = (FeatureStatistics(12) for _ in range(4))
    whole.update(vectors)
    first.update(vectors[:1000])
    second.update(vectors[1000:])
    first.merge(second)
    first.merge(empty)
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.covariance, whole.covariance)


def test_every_channel_gets_variance_one_and_no_direction_is_stretched() -> None:
    vectors, statistics = _vectors(), FeatureStatistics(12)
    statistics.update(vectors)
    normaliser = FeatureNormaliser.fit(statistics)
    found = normaliser(vectors)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.var(dim=0, correction=0), torch.ones(12), atol=1e-3, rtol=0)
    assert float(found.square().mean()) == pytest.approx(1, abs=1e-3)
    singular = torch.linalg.svdvals(normaliser.tx)
    torch.testing.assert_close(singular, singular[0].expand(12))
    torch.testing.assert_close(normaliser.invert(found), vectors, atol=1e-4, rtol=1e-4)


def test_the_scale_does_not_change_under_a_rotation() -> None:
    vectors = _vectors()
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q
    scales = []
    for given in (vectors, vectors @ rotation):
        statistics = FeatureStatistics(12)
        statistics.update(given)
        scales.append(torch.linalg.svdvals(FeatureNormaliser.fit(statistics).tx)[0])
    torch.testing.assert_close(scales[0], scales[1])

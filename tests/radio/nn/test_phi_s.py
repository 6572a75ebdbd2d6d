"""PHI-S and its rivals by their invariants, and Hadamard matrices by their definition and scipy's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as scipys

from radio.nn.phi_s import FeatureNormaliser, FeatureStatistics, Normalisation, hadamard, has_hadamard

KINDS: tuple[Normalisation, ...] = ("phi-s", "global", "channel", "pca", "zca")


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 64, 96, 128, 384])
def test_matrices_of_known_sizes_are_hadamard(size: int) -> None:
    found = hadamard(size)
    assert torch.allclose(found.abs(), torch.full_like(found, size**-0.5))
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("size", [768, 1024, 1152, 1280, 1408, 1536, 1904, 4096])  # 1904 = 28 x 68
def test_matrices_of_teachers_widths_are_hadamard(size: int) -> None:
    """One entry in size has the right modulus, and H H^T returns vectors unchanged."""
    found = hadamard(size)
    assert bool(((found.abs() - size**-0.5).abs() < 1e-12).all())
    vectors = torch.randn(size, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(found @ (found.T @ vectors), vectors, atol=1e-9)


@pytest.mark.parametrize("size", [52, 100, 244, 340, 344, 580, 680])
def test_matrices_by_prime_powers_are_hadamard(size: int) -> None:
    """Of 25, 49, 243, 169, 343, 289 and 169 elements."""
    signs = hadamard(size) * size**0.5
    assert has_hadamard(size)
    assert torch.allclose(signs, signs.sign())
    signs = signs.round()
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (12, "6775aa4a317b34a5"),
        (24, "36c42a7fd7a7bab7"),
        (28, "488f26ce1a2a5b5c"),  # 27 + 1 too, but by the prime 13
        (64, "07a573f191330bec"),
        (96, "b93bcf2b259be93e"),
        (112, "55bf87bdef90ef01"),
        (384, "ee3feb4e1eb55c93"),
        (768, "a70ca32d88fcb59b"),
    ],
)
def test_matrices_of_earlier_runs_stay(size: int, digest: str) -> None:
    """A run that goes on measures nothing anew; one that is made again must come out the same."""
    assert hashlib.sha256(hadamard(size).numpy().tobytes()).hexdigest()[:16] == digest


def test_powers_of_two_are_sylvesters() -> None:
    assert np.array_equal((hadamard(64) * 8).round().numpy(), scipys(64))


@pytest.mark.parametrize("size", [3, 6, 50, 92])
def test_other_sizes_get_a_fixed_orthogonal_matrix(size: int) -> None:
    found = hadamard(size)
    assert not has_hadamard(size)
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


def _statistics(vectors: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(vectors.shape[-1])
    statistics.update(vectors)
    return statistics


@pytest.mark.parametrize("kind", KINDS)
def test_predicting_zero_costs_one_and_inverting_returns_the_vectors(kind: Normalisation) -> None:
    vectors = _vectors()
    normaliser = FeatureNormaliser.fit(_statistics(vectors), kind)
    found = normaliser(vectors)
    assert float(found.square().mean()) == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(normaliser.invert(found), vectors, atol=1e-4, rtol=1e-4)


def test_each_kind_keeps_its_promise() -> None:
    vectors, one = _vectors(), torch.eye(12)
    found = {kind: FeatureNormaliser.fit(_statistics(vectors), kind) for kind in KINDS}
    values = {kind: normaliser(vectors) for kind, normaliser in found.items()}
    alone = (vectors - vectors.mean()) / vectors.std(correction=0)
    torch.testing.assert_close(values["global"], alone, atol=1e-4, rtol=1e-4)
    by_channel = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0, correction=0)
    torch.testing.assert_close(values["channel"], by_channel, atol=1e-4, rtol=1e-4)
    for kind in ("pca", "zca"):
        torch.testing.assert_close(values[kind].T.cov(correction=0), one, atol=2e-3, rtol=0)
    torch.testing.assert_close(found["zca"].tx, found["zca"].tx.T)  # no rotation is left
    gram = found["pca"].tx @ found["pca"].tx.T  # the rows are orthogonal, the eigenvectors scaled
    scale = gram.diagonal().rsqrt()
    torch.testing.assert_close(scale[:, None] * gram * scale, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["phi-s", "pca", "zca"])
def test_signs_of_eigenvectors_do_not_matter(kind: Normalisation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library may return any eigenvector negated."""
    genuine, statistics = torch.linalg.eigh, _statistics(_vectors())
    wanted = FeatureNormaliser.fit(statistics, kind)

    def negated(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = genuine(matrix)
        return values, vectors * torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigh", negated)
    assert torch.equal(FeatureNormaliser.fit(statistics, kind).tx, wanted.tx)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_without_variance_stay_finite(kind: Normalisation) -> None:
    """Fewer vectors than channels, one of which is constant."""
    vectors = _vectors(5)
    vectors[:, 3] = 7.0
    normaliser = FeatureNormaliser.fit(_statistics(vectors), kind)
    assert bool(torch.isfinite(normaliser.tx).all())
    found = normaliser(vectors)
    assert float(found.abs().max()) < 20
    torch.testing.assert_close(normaliser.invert(found), vectors, atol=1e-3, rtol=1e-3)


def test_masked_positions_are_left_out() -> None:
    vectors = _vectors(60).view(3, 20, 12)
    valid = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    spoiled = torch.where(valid[..., None], vectors, float("nan"))
    statistics = FeatureStatistics(12)
    statistics.update(spoiled, valid)
    statistics.update(spoiled, torch.zeros_like(valid))
    kept = vectors[valid].double()
    assert statistics.count == len(kept) == int(valid.sum())
    torch.testing.assert_close(statistics.mean, kept.mean(dim=0))
    torch.testing.assert_close(statistics.covariance, kept.T.cov(correction=0))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_is_predicting_and_inverting(kind: Normalisation) -> None:
    normaliser = FeatureNormaliser.fit(_statistics(_vectors()), kind)
    generator = torch.Generator().manual_seed(2)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((12, 5), (12,), (50, 5)))
    folded = torch.nn.functional.linear(x, *normaliser.fold(weight, bias))
    wanted = normaliser.invert(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(folded, wanted, atol=1e-5, rtol=1e-5)

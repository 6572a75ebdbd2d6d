"""Sums over batches against loops over tokens, scikit-learn, Gram matrices and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor

from evals.fidelity.measures import (
    Sums,
    cka,
    join,
    no_images,
    sum_features,
    summary_errors,
    token_errors,
)
from radio.errors import RadioError
from radio.ops import angle
from radio.types import Features

N, T, D, E, C = 7, 6, 4, 3, 5
GRID = (2, 3)


def features(width: int, seed: int, offset: float = 0.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(N, T, width, generator=generator) + offset
    return Features(torch.randn(N, C, generator=generator) + 1, tokens, GRID)


TEACHER = features(D, 0, offset=3.0)
ADAPTED = Features(
    *(x + 0.3 * y for x, y in zip(TEACHER[:2], features(D, 1)[:2], strict=True)),
    GRID,
)
OWN = features(E, 2)


def sums(own: Features = OWN, adapted: Features = ADAPTED, teacher: Features = TEACHER) -> Sums:
    return join([no_images(C, D, E), sum_features(own, adapted, teacher)])


def share(pairs: Tensor) -> float:
    return float(pairs[:, 0].sum() / pairs[:, 1].sum())


def gram_cka(x: Tensor, y: Tensor) -> float:
    """By the kernels of all tokens [P, P], centred on both sides."""
    x, y = x.double().flatten(0, 1), y.double().flatten(0, 1)
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    return float((k * m).sum() / (k.norm() * m.norm()))


def test_unexplained_variance_by_a_loop_and_by_scikit_learn() -> None:
    tokens = TEACHER.tokens.flatten(0, 1).double().tolist()
    guesses = ADAPTED.tokens.flatten(0, 1).double().tolist()
    mean = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
    error = variance = 0.0
    for token, guess in zip(tokens, guesses, strict=True):
        for value, guessed, middle in zip(token, guess, mean, strict=True):
            error += (guessed - value) ** 2
            variance += (value - middle) ** 2
    pairs = token_errors(sums())
    assert pairs.shape == (N, 2)
    assert share(pairs) == pytest.approx(error / variance, rel=1e-12)
    r2 = r2_score(tokens, guesses, multioutput="variance_weighted")
    assert share(pairs) == pytest.approx(1 - r2, rel=1e-9)


def test_cka_by_gram_matrices() -> None:
    adapted, own = cka(sums())
    assert adapted == pytest.approx(gram_cka(ADAPTED.tokens, TEACHER.tokens), rel=1e-9)
    assert own == pytest.approx(gram_cka(OWN.tokens, TEACHER.tokens), rel=1e-9)
    assert 0 < own < adapted < 1


def test_cka_ignores_a_rotation_a_factor_and_an_offset() -> None:
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]
    turned = ADAPTED._replace(tokens=5 * TEACHER.tokens @ rotation + 2)
    assert cka(sums(adapted=turned))[0] == pytest.approx(1, abs=1e-6)


def test_angles_by_numpy() -> None:
    y, x = TEACHER.summary.double().numpy(), ADAPTED.summary.double().numpy()

    def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.arccos((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))

    wanted = (between(x, y) ** 2).mean() / (between(y, y.mean(axis=0)) ** 2).mean()
    assert share(summary_errors(sums())) == pytest.approx(wanted, rel=1e-9)
    a, b = torch.tensor([[1.0, 0], [0, 0], [2, 0]]), torch.tensor([[0, 3.0], [1, 0], [-1, 0]])
    assert angle(a, b).tolist() == pytest.approx([np.pi / 2, np.pi / 2, np.pi])


def test_a_perfect_student() -> None:
    perfect = sums(adapted=TEACHER)
    assert share(token_errors(perfect)) == 0
    assert cka(perfect)[0] == pytest.approx(1, abs=1e-12)
    assert share(summary_errors(perfect)) == 0


def test_the_mean_token_and_the_mean_direction_cost_one() -> None:
    mean = Features(
        TEACHER.summary.double().mean(dim=0).expand(N, C),
        TEACHER.tokens.double().mean(dim=(0, 1)).expand(N, T, D),
        GRID,
    )
    constant = sums(adapted=mean)
    assert share(token_errors(constant)) == pytest.approx(1, rel=1e-12)
    assert share(summary_errors(constant)) == pytest.approx(1, rel=1e-12)
    assert cka(constant)[0] == 0


def test_sums_do_not_depend_on_batches() -> None:
    parts = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, N)):
        own, adapted, teacher = (
            Features(each.summary[rows], each.tokens[rows], GRID) for each in (OWN, ADAPTED, TEACHER)
        )
        parts.append(sum_features(own, adapted, teacher))
    for whole, joined in zip(sums(), join(parts), strict=True):
        torch.testing.assert_close(whole, joined, rtol=1e-12, atol=1e-12)


def test_the_students_own_tokens_are_resampled_to_the_teachers_grid() -> None:
    fine = Features(OWN.summary, OWN.map().repeat_interleave(2, 2).repeat_interleave(2, 3), (4, 6))
    fine = fine._replace(tokens=fine.tokens.flatten(2).transpose(1, 2))
    assert cka(sums(own=fine))[1] == pytest.approx(cka(sums())[1], rel=1e-6)


def test_a_teacher_that_does_not_vary_is_an_error() -> None:
    flat = TEACHER._replace(tokens=torch.full((N, T, D), 0.1))
    with pytest.raises(RadioError, match="its tokens are all the same; give different images"):
        token_errors(sums(teacher=flat))
    with pytest.raises(RadioError, match="its summaries are all the same; give different images"):
        summary_errors(sums(teacher=TEACHER._replace(summary=torch.full((N, C), 0.1))))

"""The heads are scikit-learn's and torch.optim.SGD's; what is held out is a function of labels and seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression as Reference
from torch import Tensor, nn

from evals.linear import solvers
from evals.linear.solvers import (
    PENALTIES,
    RATES,
    TOLERANCE,
    Head,
    LogisticRegression,
    check_memory,
    fit_by_sgd,
    hold_out,
    sample_batches,
)
from radio.errors import SizeError

CPU = torch.device("cpu")


def data(count: int = 150, width: int = 6, num_classes: int = 4, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overlapping classes with unlike variances along the axes and a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % num_classes
    centres = torch.randn(num_classes, width, generator=generator)
    features = centres[labels] + torch.randn(count, width, generator=generator)
    return scale * (features * torch.logspace(-1, 1, width) + 5), labels


def fit(features: Tensor, labels: Tensor, c: float, dtype: torch.dtype = torch.float64) -> Head:
    problem = LogisticRegression(
        features, labels, torch.arange(len(labels)), int(labels.max()) + 1, device=CPU, dtype=dtype
    )
    return problem.fit(c, max_iterations=1000, tolerance=1e-12).head


def logits(head: Head, features: Tensor) -> Tensor:
    return torch.cat(list(head.logits(features)))


def objective(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, c: float) -> float:
    loss = F.cross_entropy(features.double() @ weight.double() + bias.double(), labels)
    return float(loss + weight.double().square().sum() / (2 * c * len(labels)))


@pytest.mark.parametrize(
    ("c", "dtype", "scale"),
    [
        (1e-4, torch.float64, 1.0),
        (1.0, torch.float64, 1.0),
        (100.0, torch.float64, 1.0),
        (0.01, torch.float64, 30.0),
        (1.0, torch.float32, 1.0),
    ],
)
def test_logistic_regression_is_scikit_learns(c: float, dtype: torch.dtype, scale: float) -> None:
    features, labels = data(scale=scale)
    head = fit(features, labels, c, dtype)
    # Newton's method, since scikit-learn's own L-BFGS does not converge on features as these are.
    reference = Reference(C=c, solver="newton-cg", tol=1e-10, max_iter=10_000)
    reference.fit(features.double().numpy(), labels.numpy())
    theirs = torch.from_numpy(reference.coef_).T, torch.from_numpy(reference.intercept_)
    mine = objective(head.weight, head.bias, features, labels, c)
    assert mine == pytest.approx(objective(*theirs, features, labels, c), rel=1e-6)
    assert (
        logits(head, features).argmax(dim=1).tolist() == reference.predict(features.double().numpy()).tolist()
    )
    if dtype == torch.float64:
        assert torch.allclose(head.weight, theirs[0], atol=1e-3 * float(theirs[0].abs().max()))


@pytest.mark.parametrize("c", [17.8, 316.0, 1e5])
def test_the_default_tolerance_meets_scikit_learn_at_the_grids_upper_end(c: float) -> None:
    """Separable classes, whose loss falls slowly: the objective, and the classes of new images."""
    generator = torch.Generator().manual_seed(0)
    features, new = (torch.randn(count, 12, generator=generator) for count in (120, 500))
    labels = (features @ torch.randn(12, 4, generator=generator)).argmax(dim=1)
    problem = LogisticRegression(features, labels, torch.arange(120), 4, device=CPU, dtype=torch.float64)
    found = problem.fit(c, max_iterations=1000, tolerance=TOLERANCE)
    reference = Reference(C=c, solver="newton-cg", tol=1e-9, max_iter=10_000)
    reference.fit(features.double().numpy(), labels.numpy())
    theirs = torch.from_numpy(reference.coef_).T, torch.from_numpy(reference.intercept_)
    mine = objective(found.head.weight, found.head.bias, features, labels, c)
    assert found.converged and mine == pytest.approx(objective(*theirs, features, labels, c), rel=1e-4)
    for images, least in ((features, 0.0), (new, 0.01)):  # new ones may lie on the border of two classes
        wanted = images.double() @ theirs[0] + theirs[1]
        best = wanted.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > least * best[:, 0].abs()
        assert clear.float().mean() > 0.98
        assert torch.equal(logits(found.head, images).argmax(dim=1)[clear], wanted.argmax(dim=1)[clear])


def test_a_fit_does_not_depend_on_those_before() -> None:
    features, labels = data()
    problem = LogisticRegression(features, labels, torch.arange(150), 4, device=CPU, dtype=torch.float64)
    path = [problem.fit(c, max_iterations=1000, tolerance=1e-12).head for c in (1e-3, 0.1, 10.0)]
    for head, c in zip(path, (1e-3, 0.1, 10.0), strict=True):
        assert torch.allclose(head.weight, fit(features, labels, c).weight, atol=1e-4)


def test_separable_features_in_single_precision_are_fitted_over_the_whole_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    centres = 3 * torch.randn(10, 64, generator=generator)
    features = centres[labels] + torch.randn(600, 64, generator=generator)
    problem = LogisticRegression(features, labels, torch.arange(600), 10, device=CPU, dtype=torch.float32)
    for c in PENALTIES:
        head = problem.fit(c, max_iterations=1000, tolerance=1e-12).head
        assert bool(head.weight.isfinite().all()) and bool(head.bias.isfinite().all())
    assert torch.equal(logits(head, features).argmax(dim=1), labels)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data()
    whole = fit(features, labels, 1.0)
    monkeypatch.setattr(solvers, "_CELLS", 64)
    assert torch.allclose(fit(features, labels, 1.0).weight, whole.weight, atol=1e-5)
    assert len(list(whole.logits(features))) == 10


def test_only_the_rows_count_and_the_end_of_the_iterations_is_told() -> None:
    features, labels = data()
    rows = torch.arange(0, 150, 2) + torch.arange(75) % 2
    problem = LogisticRegression(features, labels, rows, 4, device=CPU, dtype=torch.float64)
    found = problem.fit(1.0, max_iterations=1000, tolerance=1e-12)
    assert torch.allclose(found.head.weight, fit(features[rows], labels[rows], 1.0).weight, atol=1e-6)
    assert found.converged and found.value == 1.0
    assert not problem.fit(1e3, max_iterations=2, tolerance=1e-12).converged


def test_a_fit_that_its_evaluations_end_has_not_converged() -> None:
    """The line search takes all six evaluations of three iterations in the first."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 20, generator=generator) * torch.logspace(-2, 2, 20) + 10
    labels = torch.randint(0, 7, (300,), generator=generator)
    problem = LogisticRegression(features, labels, torch.arange(300), 7, device=CPU, dtype=torch.float64)
    for c in (1e5, 1e-6):
        assert not problem.fit(c, max_iterations=3, tolerance=TOLERANCE).converged


def test_a_feature_that_never_varies_has_no_weight() -> None:
    features, labels = data()
    head = fit(F.pad(features, (0, 1), value=3.0), labels, 1.0)
    assert float(head.weight[-1].abs().max()) < 1e-9


def test_sgd_is_torchs_for_every_rate_and_kind_of_features() -> None:
    features, labels = data(width=5)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    rates, iterations, batch = [0.001, 0.02, 0.1], 23, 32
    kinds = {"some": 3, "all": 5}
    steps: list[int] = []
    fits = list(
        fit_by_sgd(
            features,
            labels,
            4,
            kinds,
            rates,
            iterations=iterations,
            batch=batch,
            seed=7,
            advance=steps.append,
        )
    )
    assert [(each.features, each.value) for each in fits] == [(k, r) for k in kinds for r in rates]
    assert steps == [1] * iterations
    generator = torch.Generator().manual_seed(7)
    first = {kind: 0.01 * torch.randn(width, 4, generator=generator) for kind, width in kinds.items()}
    for found in fits:
        width = kinds[found.features]
        layer = nn.Linear(width, 4)
        layer.weight.data, layer.bias.data = first[found.features].T.clone(), torch.zeros(4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=found.value * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=0)
        for rows in sample_batches(150, batch, iterations, 7):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows, :width]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
        assert torch.allclose(found.head.weight, layer.weight.T, atol=1e-5)
        assert torch.allclose(found.head.bias, layer.bias, atol=1e-5)


def test_an_epoch_has_every_image_once_and_the_seed_decides_the_order() -> None:
    batches = list(sample_batches(10, 4, 10, seed=3))
    for epoch in torch.cat(batches).split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert torch.equal(torch.cat(list(sample_batches(10, 5, 8, seed=3))), torch.cat(batches))
    assert not torch.equal(torch.cat(list(sample_batches(10, 4, 10, seed=4))), torch.cat(batches))
    assert [len(rows) for rows in sample_batches(3, 8, 4, seed=0)] == [8] * 4  # more than an epoch each


def test_every_tenth_image_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 30 + [3])[torch.randperm(181)]
    kept, held = hold_out(labels, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(181))
    counts = labels[held].bincount(minlength=4).tolist()
    assert all(abs(count - size / 10) < 1 for count, size in zip(counts, (100, 50, 30, 1), strict=True))
    assert torch.equal(hold_out(labels, seed=0)[1], held) and not torch.equal(
        hold_out(labels, seed=1)[1], held
    )
    assert [len(rows) for rows in hold_out(torch.tensor([0, 1]), seed=5)] == [1, 1]


def test_the_grids_are_dinov2s() -> None:
    assert np.allclose(PENALTIES, 10 ** np.linspace(-6, 5, 45))
    assert len(RATES) == 13 and RATES[0] == 1e-5 and RATES[-1] == 0.1 and list(RATES) == sorted(RATES)


def test_what_is_larger_than_the_memory_is_an_error_before_any_work() -> None:
    check_memory(1000, 100, 10, CPU, torch.float64)
    with pytest.raises(
        SizeError, match=r"a linear head for 1000 classes on 2,000,000,000 x 1024 features takes "
    ):
        check_memory(2_000_000_000, 1024, 1000, CPU, torch.float64)


@pytest.mark.parametrize(("ranks", "gigabytes"), [(1, 7.1), (4, 13.1)])
def test_ranks_share_the_memory_and_one_of_them_fits(
    monkeypatch: pytest.MonkeyPatch, ranks: int, gigabytes: float
) -> None:
    """4 GB as float64 and 1.1 GB of the fit on one rank, 2 GB of float32 features on each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(solvers, "memory_of", lambda _: int((gigabytes + 0.05) * 1e9 / ranks))
    check_memory(1_000_000, 500, 10, CPU, torch.float64)
    monkeypatch.setattr(solvers, "memory_of", lambda _: int((gigabytes - 0.05) * 1e9 / ranks))
    with pytest.raises(SizeError, match=f"takes {gigabytes} GB, and cpu has {gigabytes - 0.05:.1f}"):
        check_memory(1_000_000, 500, 10, CPU, torch.float64)


def test_a_penalty_that_leaves_nothing_gives_equal_classes() -> None:
    features, labels = data(num_classes=2)
    found = logits(fit(features, labels, 1e-12), features)
    assert math.isclose(float(found.softmax(dim=1)[0, 0]), 0.5, abs_tol=1e-4)

"""Principal components against numpy's SVD and scikit-learn's PCA, and colors along them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from evals.maps.evaluator import Components
from radio.errors import DataError


def tokens(count: int = 200, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.1, width)
    return torch.randn(count, width, generator=generator) * scale + 5


def test_components_equal_numpys_svd_and_scikit_learns() -> None:
    points = tokens()
    found = Components.fit(points)
    centred = points.double().numpy() - points.double().numpy().mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(found.axes.numpy(), axes, atol=1e-9)
    other = PCA(n_components=3, svd_solver="full").fit(points.double().numpy())
    ours, theirs = found.coordinates(points).numpy(), other.transform(points.double().numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-9)
    assert found.explained(points) == pytest.approx(other.explained_variance_ratio_.sum())


def test_signs_do_not_depend_on_the_solver() -> None:
    """Points and their mirror image have the same axes, the largest entry positive."""
    points = tokens()
    axes = Components.fit(points).axes
    assert (axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) > 0).all()
    torch.testing.assert_close(Components.fit(-points).axes, axes, atol=1e-9, rtol=0)


def test_colors_span_the_range_and_what_does_not_vary_is_grey() -> None:
    points = tokens()
    colors = Components.fit(points).colors(points)
    assert colors.shape == (200, 3) and colors.min() == 0 and colors.max() == 1
    line = torch.linspace(0, 1, 50)[:, None] * torch.ones(2)  # one dimension of two
    colors = Components.fit(line).colors(line)
    assert torch.equal(colors[:, 1:], torch.full((50, 2), 0.5).double())
    still = torch.ones(5, 4)
    assert torch.equal(Components.fit(still).colors(still), torch.full((5, 3), 0.5).double())
    assert Components.fit(still).explained(still) == 0


def test_values_that_are_not_finite_are_refused() -> None:
    points = tokens()
    points[3, 2] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        Components.fit(points)

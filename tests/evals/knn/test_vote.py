from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from evals.knn.index import Index, vote
from radio.errors import DataError

TEMPERATURE = 0.07


def classify(bank: Tensor, labels: Tensor, queries: Tensor, ks: tuple[int, ...]) -> dict[int, Tensor]:
    found = Index(bank, torch.arange(len(bank))).search(queries, max(ks))
    voters = labels[found.ids.clamp(min=0)].masked_fill(found.ids < 0, -1)
    return vote(found.similarities, voters, ks, num_classes=int(labels.max()) + 1, temperature=TEMPERATURE)


def sklearn_predictions(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> np.ndarray:
    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp(((1 - distances) - 1) / TEMPERATURE)

    model = KNeighborsClassifier(min(k, len(bank)), metric="cosine", algorithm="brute", weights=weights)
    return np.asarray(model.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy()))


def world(
    count: int, classes: int, *, seed: int = 0, imbalance: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Class centres with noise: a bank, its labels, and queries."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.arange(1, classes + 1).double() ** -imbalance
    labels = torch.multinomial(shares, count, replacement=True, generator=generator)
    centres = torch.randn(classes, 32, generator=generator)
    bank = centres[labels] + 2 * torch.randn(count, 32, generator=generator)
    asked = centres[torch.randint(classes, (300,), generator=generator)]
    return bank, labels, asked + 2 * torch.randn(300, 32, generator=generator)


@pytest.mark.parametrize("imbalance", [0.0, 2.0])
def test_predictions_equal_scikit_learns_on_five_thousand_vectors(imbalance: float) -> None:
    bank, labels, queries = world(5000, 40, imbalance=imbalance)
    ks = (1, 10, 20, 100, 200)
    found = classify(bank, labels, queries, ks)
    for k in ks:
        assert found[k][:, 0].numpy().tolist() == sklearn_predictions(bank, labels, queries, k).tolist()


def test_predictions_equal_scikit_learns_with_fewer_than_k_samples() -> None:
    bank, labels, queries = world(13, 4)
    found = classify(bank, labels, queries, (5, 20))
    for k in (5, 20):
        assert found[k][:, 0].numpy().tolist() == sklearn_predictions(bank, labels, queries, k).tolist()


def test_predictions_equal_scikit_learns_with_one_class() -> None:
    bank, _, queries = world(50, 3)
    labels = torch.zeros(50, dtype=torch.int64)
    found = classify(bank, labels, queries, (20,))[20]
    assert found[:, 0].tolist() == sklearn_predictions(bank, labels, queries, 20).tolist()
    assert (found[:, 1:] == -1).all()


def test_votes_by_hand() -> None:
    similarities = torch.tensor([[0.9, 0.86, 0.86, 0.5]])
    labels = torch.tensor([[2, 1, 1, 0]])
    near, far = 1.0, 2 * math.exp(-0.04 / TEMPERATURE)
    assert far > near  # two together outvote the nearest
    found = vote(similarities, labels, (1, 2, 4), num_classes=4, temperature=TEMPERATURE)
    assert found[1].tolist() == [[2, -1, -1, -1, -1]]
    assert found[2].tolist() == [[2, 1, -1, -1, -1]]
    assert found[4].tolist() == [[1, 2, 0, -1, -1]]


def test_equal_votes_go_to_the_lower_class() -> None:
    similarities = torch.full((2, 4), 0.3)
    labels = torch.tensor([[3, 1, 2, 0], [7, 7, 2, 2]])
    found = vote(similarities, labels, (4,), num_classes=8, temperature=TEMPERATURE)[4]
    assert found[:, :2].tolist() == [[0, 1], [2, 7]]


def test_far_neighbours_still_vote_at_a_low_temperature() -> None:
    found = vote(
        torch.tensor([[-0.9, -0.95]]), torch.tensor([[1, 0]]), (2,), num_classes=2, temperature=0.001
    )
    assert found[2][0, 0] == 1


def test_no_neighbours_are_no_prediction() -> None:
    found = vote(
        torch.full((1, 3), -torch.inf), torch.full((1, 3), -1), (3,), num_classes=2, temperature=TEMPERATURE
    )
    assert found[3].tolist() == [[-1, -1, -1, -1, -1]]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_above_zero(temperature: float) -> None:
    with pytest.raises(DataError, match="above 0"):
        vote(
            torch.zeros(1, 1),
            torch.zeros(1, 1, dtype=torch.int64),
            (1,),
            num_classes=1,
            temperature=temperature,
        )

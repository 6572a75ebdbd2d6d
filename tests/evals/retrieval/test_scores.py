"""Average precision by the published rule: against a slow loop, by hand, and over all orders."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from evals.retrieval.scores import chance, rank, score_ranking


def slow(order: list[int], positive: set[int], junk: set[int], k: int) -> tuple[float, float]:
    """Walk down one ranking: trapezoids under precision over recall, and precision at k."""
    found, seen, area, places = 0, 0, 0.0, []
    for image in order:
        if image in junk:
            continue
        if image in positive:
            before = 1.0 if seen == 0 else found / seen
            after = (found + 1) / (seen + 1)
            area += (before + after) / 2 / len(positive)
            found += 1
            places.append(seen + 1)
        seen += 1
    if not positive:
        return math.nan, math.nan
    most = min(k, max(places))
    return area, sum(place <= most for place in places) / most


def one_hot(ids: set[int], count: int) -> Tensor:
    return torch.tensor([[image in ids for image in range(count)]])


def test_a_slow_loop_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        count = int(torch.randint(2, 30, (), generator=generator))
        grades = torch.randint(0, 4, (3, count), generator=generator)
        ranking = torch.stack([torch.randperm(count, generator=generator) for _ in range(3)])
        scores = score_ranking(ranking, grades == 1, grades == 2, (1, 5, 10))
        for row in range(3):
            of = [set((grades[row] == grade).nonzero().flatten().tolist()) for grade in (1, 2)]
            for k in (1, 5, 10):
                ap, precision = slow(ranking[row].tolist(), of[0], of[1], k)
                assert float(scores.ap[row]) == pytest.approx(ap, abs=1e-12, nan_ok=True)
                assert float(scores.precision[k][row]) == pytest.approx(precision, abs=1e-12, nan_ok=True)


def test_by_hand() -> None:
    """Junk, positive, other, positive: precisions 1 and 1, then 1/2 and 2/3."""
    ranking = torch.tensor([[3, 1, 0, 2]])
    scores = score_ranking(ranking, one_hot({1, 2}, 4), one_hot({3}, 4), (1, 2, 10))
    assert float(scores.ap) == pytest.approx((1 + 1) / 4 + (1 / 2 + 2 / 3) / 4)
    assert [float(scores.precision[k]) for k in (1, 2, 10)] == pytest.approx([1, 1 / 2, 2 / 3])


@pytest.mark.parametrize(("count", "num_positive"), [(1, 1), (4, 1), (5, 2), (5, 5), (6, 3)])
def test_chance_is_the_mean_over_all_orders(count: int, num_positive: int) -> None:
    orders = torch.tensor(list(itertools.permutations(range(count))))
    positive = one_hot(set(range(num_positive)), count).expand(len(orders), -1)
    scores = score_ranking(orders, positive, torch.zeros_like(positive), (1,))
    assert chance(count, num_positive) == pytest.approx(float(scores.ap.mean()), abs=1e-12)


def test_images_are_ranked_by_cosine_and_equal_ones_by_number() -> None:
    database = torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.3, 0.1], [5.0, 0.0], [0.6, 0.2]])
    assert rank(torch.tensor([[7.0, 0.0]]), database).tolist() == [[1, 3, 2, 4, 0]]
    generator = torch.Generator().manual_seed(1)
    queries, database = torch.randn(4, 8, generator=generator), torch.randn(50, 8, generator=generator)
    cosines = torch.cosine_similarity(queries[:, None].double(), database[None].double(), dim=-1)
    assert rank(queries, database).tolist() == cosines.argsort(dim=1, descending=True).tolist()

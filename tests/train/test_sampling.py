"""What is drawn at random depends on the seed and the place alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from train.data.crops import draw_window, generator, seed_of, shuffled_index


@pytest.mark.parametrize("count", [1, 7, 100])
def test_every_epoch_is_a_permutation(count: int) -> None:
    epochs = [
        [shuffled_index(epoch * count + place, count, 3) for place in range(count)] for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(count)) for order in epochs)
    if count == 100:
        assert all(one != other for one, other in pairwise(epochs))


def test_order_depends_on_the_seed() -> None:
    orders = [[shuffled_index(place, 50, seed) for place in range(50)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_order_can_be_asked_for_anywhere() -> None:
    forward = [shuffled_index(position, 10, 5) for position in range(60)]
    backward = [shuffled_index(position, 10, 5) for position in reversed(range(60))]
    assert forward == backward[::-1]


def test_seeds_differ_by_purpose_index_and_seed() -> None:
    seeds = {
        seed_of(seed, purpose, index)
        for seed in range(5)
        for purpose in ("order", "crop", "positions", "window")
        for index in range(50)
    }
    assert len(seeds) == 5 * 4 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat_and_leave_torchs_own_alone() -> None:
    before = torch.random.get_rng_state()
    draws = [torch.rand(3, generator=generator(1, "crop", 9)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_windows_are_drawn_evenly() -> None:
    candidates = (2, 4, 8, 16)
    counts = Counter(draw_window(candidates, 7, step) for step in range(2000))
    assert set(counts) == set(candidates)
    expected = 2000 / len(candidates)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 16.27  # three degrees of freedom, p = 0.001


def test_a_student_without_windows_draws_none() -> None:
    assert draw_window((), 0, 3) is None

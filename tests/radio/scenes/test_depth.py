"""Depth agrees with what hides what, with the objects' sizes and with the background's plane."""

from __future__ import annotations

import numpy as np
import pytest

from radio.scenes import SceneError, depth, render
from radio.scenes.world import Figure, _cover, _visible, layout_scene

INDICES = range(60)


def drawn(index: int, size: int = 96) -> list[tuple[int, Figure, np.ndarray]]:
    """The objects back to front, each with its mask [size, size]."""
    entries = []
    for number, figure, coverage in _visible(layout_scene(index, split="train", seed=0), size):
        mask = np.zeros((size, size), dtype=bool)
        mask[coverage.window] = coverage.alpha >= 0.5
        entries.append((number, figure, mask))
    return entries


def of_objects(index: int, size: int = 96) -> dict[int, float]:
    """The depth of each object that shows, by its number; it has one depth only."""
    depths, found = depth(index, size=size), {}
    owner = np.zeros((size, size), dtype=int)
    for number, _, mask in drawn(index, size):
        owner[mask] = number
    for number in np.unique(owner[owner > 0]).tolist():
        (found[number],) = np.unique(depths[owner == number]).tolist()
    return found


def test_an_object_in_front_is_nearer_than_what_it_hides() -> None:
    hidden = 0
    for index in INDICES:
        depths, entries = of_objects(index), drawn(index)
        for place, (back, _, behind) in enumerate(entries):
            for front, _, before in entries[place + 1 :]:
                if (behind & before).any():
                    hidden += 1
                    assert depths[front] <= 0.951 * depths[back]
    assert hidden > 10


def test_an_object_that_hides_nothing_is_as_far_as_its_size_says() -> None:
    alone = 0
    for index in INDICES:
        depths, below = of_objects(index), np.zeros((96, 96), dtype=bool)
        plan = layout_scene(index, split="train", seed=0)
        for number, figure, _ in drawn(index):
            coverage = _cover(figure, 96)
            if not below[coverage.window][coverage.alpha > 0].any():
                alone += 1
                assert depths[number] == pytest.approx(0.5 / figure.radius, rel=1e-6)
            below[coverage.window] |= coverage.alpha > 0
        assert depths[1] <= 0.5 / plan.main.radius + 1e-6
    assert alone > 100


def test_the_background_is_a_plane_seen_in_perspective() -> None:
    depths, free = depth(3), render(3).instances == 0
    inverse = 1 / depths.astype(np.float64)
    rows = (np.arange(96)[:, None] + np.zeros(96)) / 96 + 1 / 192
    expected = (1 - rows) / 9 + rows / 6
    assert np.abs(inverse - expected)[free].max() < 1e-7
    assert depths[free].min() > depths[~free].max()


@pytest.mark.parametrize("size", [48, 200])
def test_another_size_has_the_same_depths(size: int) -> None:
    for index in range(20):
        there, here = of_objects(index), of_objects(index, size)
        assert here.keys() <= there.keys()
        assert all(here[number] == there[number] for number in here)


def test_depths_cover_the_objects_that_are_drawn() -> None:
    for index in range(20):
        depths, instances = depth(index), render(index).instances
        assert depths.dtype == np.float32 and depths.shape == (96, 96)
        assert np.array_equal(depths < 5.99, instances > 0)


def test_bad_input_is_the_renderers_error() -> None:
    with pytest.raises(SceneError, match="a scene of 8 px cannot be drawn"):
        depth(0, size=8)
    with pytest.raises(SceneError, match="must be whole numbers"):
        depth(-1)

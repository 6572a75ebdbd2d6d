"""Means and laps."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from radio.dist import Group
from train.metrics import Clock, Meters


def test_means_since_the_last_reading() -> None:
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add({"loss": torch.tensor(value), "norm": torch.tensor(10 * value)})
    meters.add({"loss": torch.tensor(3.0)})
    assert meters.read(Group()) == {"loss": pytest.approx(3.0), "norm": pytest.approx(30.0)}
    assert meters.read(Group()) == {}
    meters.add({"loss": torch.tensor(5.0)})
    assert meters.read(Group()) == {"loss": 5.0}


def test_sums_are_kept_in_double_precision() -> None:
    meters = Meters()
    for _ in range(3000):
        meters.add({"loss": torch.tensor(0.1)})
    exact = float(torch.tensor(0.1))
    assert meters.read(Group())["loss"] == pytest.approx(exact, rel=1e-12)


def test_gradients_are_let_go() -> None:
    meters = Meters()
    value = torch.tensor(2.0, requires_grad=True)
    meters.add({"loss": value * 2})
    meters.add({"loss": value * 3})
    assert meters.state() == [(["loss"], [10.0, 2.0])]


def test_restored_meters_go_on_bit_for_bit() -> None:
    values = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in range(9)]
    whole, first, second = Meters(), Meters(), Meters()
    for value in values:
        whole.add({"loss": value})
    for value in values[:4]:
        first.add({"loss": value})
    second.restore(first.state(), torch.device("cpu"))
    for value in values[4:]:
        second.add({"loss": value})
    assert second.read(Group()) == whole.read(Group())


def test_means_go_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(self: Group, value: Any) -> list[Any]:  # of another teacher, with one step less
        return [value, [(["loss", "sam/spatial"], [9.0, 7.0, 1.0])]]

    monkeypatch.setattr(Group, "gather_objects", another)
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0), "clip/spatial": torch.tensor(2.0)})
    meters.add({"loss": torch.tensor(3.0), "clip/spatial": torch.tensor(3.0)})
    means = meters.read(Group(0, 2))
    assert means == {"loss": pytest.approx(13 / 3), "clip/spatial": 2.5, "sam/spatial": 7.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_left_out_is_in_no_mean(bad: float) -> None:
    meters = Meters()
    meters.add({"loss": torch.tensor(2.0)}, torch.tensor(True))
    meters.add({"loss": torch.tensor(bad)}, torch.tensor(False))
    assert meters.read(Group()) == {"loss": 2.0}
    meters.add({"loss": torch.tensor(bad)}, torch.tensor(False))
    assert math.isnan(meters.read(Group())["loss"])


def test_what_several_ranks_kept_is_taken_up_by_one() -> None:
    states = []
    for value in (1.0, 4.0):
        meters = Meters()
        meters.add({"loss": torch.tensor(value)})
        states += meters.state()
    meters = Meters()
    meters.restore(states, torch.device("cpu"))
    meters.add({"loss": torch.tensor(4.0)})
    assert meters.read(Group()) == {"loss": 3.0}


def test_a_lap_ends_with_its_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 107.0, 109.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    clock.step(0.5)
    clock.step(1.5)
    assert clock.read() == (7.0, 2.0, 2)
    assert clock.read() == (2.0, 0.0, 0)

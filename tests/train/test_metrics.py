"""Means and laps."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from evals.core.dist import Group
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
    assert all(not total.requires_grad for total, _ in meters.state().values())


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
    def doubled(self: Group, array: Tensor) -> Tensor:  # the other rank's sums are three times ours
        return array + 3 * array

    monkeypatch.setattr(Group, "sum", doubled)
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0)})
    meters.add({"loss": torch.tensor(3.0)})
    assert meters.read(Group(0, 2)) == {"loss": pytest.approx((1 + 3 + 3 + 9) / 4)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finite_sees_one_bad_value(bad: float) -> None:
    meters = Meters()
    assert meters.finite()
    meters.add({"loss": torch.tensor(1.0), "norm": torch.tensor(bad)})
    meters.add({"loss": torch.tensor(1.0), "norm": torch.tensor(1.0)})
    assert not meters.finite()


def test_a_lap_ends_with_its_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 107.0, 109.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    clock.step(0.5)
    clock.step(1.5)
    assert clock.read() == (7.0, 2.0, 2)
    assert clock.read() == (2.0, 0.0, 0)

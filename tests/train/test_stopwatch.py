"""Where the time goes, by a clock that the test sets."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from train.stopwatch import PHASES, Stopwatch, Times, mean_times

CPU = torch.device("cpu")


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    clock = Hand()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_phases_and_groups(hand: Hand) -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        watch.waited(0.5)
        for phase, group, seconds in (
            ("teachers", "sam", 1.0),
            ("forward", "sam", 2.0),
            ("forward", "clip", 4.0),
            ("backward", "clip", 8.0),
            ("optimiser", "", 16.0),
        ):
            with watch.time(phase, group):  # type: ignore[arg-type]
                hand.now += seconds
        hand.now += 100  # between the phases
    times = watch.read(2)
    assert times.phases == {
        "data": 0.5,
        "teachers": 1.0,
        "forward": 6.0,
        "backward": 8.0,
        "communication": 0.0,
        "optimiser": 16.0,
    }
    assert times.groups == {"sam": 3.0, "clip": 12.0}
    assert watch.read(1) == Times(dict.fromkeys(PHASES, 0.0), {})
    assert times.record()["time/data"] == 0.5
    assert times.record()["perf/step_time/clip"] == 12.0


def test_no_moment_counts_twice_for_the_groups(hand: Hand) -> None:
    watch = Stopwatch(CPU)
    with watch.time("teachers", "sam"):
        hand.now += 1.0
        with watch.time("forward", "clip"):  # of the step before, beside the teachers of the next
            hand.now += 2.0
        with watch.time("backward", "sam"):
            hand.now += 4.0
    with watch.time("backward", "clip"):
        hand.now += 8.0
    times = watch.read(1)
    assert (times.phases["teachers"], times.phases["forward"], times.phases["backward"]) == (7.0, 2.0, 12.0)
    assert times.groups == {"sam": 1.0 + 2.0 / 2 + 4.0, "clip": 2.0 / 2 + 8.0}
    assert sum(times.groups.values()) == 15.0  # as the clock went


def test_what_comes_after_the_last_gradient_is_communication(hand: Hand) -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def exchange(weight: torch.Tensor) -> None:
        hand.now += 10.0

    watch = Stopwatch(CPU, last=layers[0].parameters())
    for weight in layers[1].parameters():  # the backward meets these first
        weight.register_post_accumulate_grad_hook(exchange)
    with watch.time("forward"):
        loss = layers(torch.ones(1, 2)).sum()
    with watch.time("backward", "clip"):
        loss.backward()
        hand.now += 5.0
    times = watch.read(1)
    assert times.phases["backward"] == 20.0  # both of the later layer's weights
    assert times.phases["communication"] == 5.0
    assert times.groups == {"clip": 20.0}
    with watch.time("backward"):  # without a gradient for them, all of it is the backward
        hand.now += 3.0
    assert watch.read(1).phases["backward"] == 3.0


def test_means_over_ranks() -> None:
    one = Times(dict.fromkeys(PHASES, 1.0), {"clip": 2.0})
    other = Times(dict.fromkeys(PHASES, 3.0), {"clip": 4.0})
    third = Times(dict.fromkeys(PHASES, 5.0), {"sam": 7.0})
    found = mean_times([one, other, third])
    assert found.phases == dict.fromkeys(PHASES, 3.0)
    assert found.groups == {"clip": 3.0, "sam": 7.0}

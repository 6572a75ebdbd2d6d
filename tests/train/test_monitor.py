"""Means, skipped steps, times and speed, against counts by hand and a clock that the test sets."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radio.dist import Ranks
from radio.errors import RadioError
from tests.train.conftest import CPU, TEACHERS, Start, read_records
from train.config import TeacherConfig, TrainConfig
from train.groups import make_partition
from train.monitor import (
    PHASES,
    MetricMeans,
    NonFiniteMonitor,
    PerformanceMonitor,
    PhaseTimer,
    SkippedSteps,
    Times,
    mean_times,
)
from train.plan import step_flops


def test_means_since_the_last_reading() -> None:
    meters = MetricMeans()
    for value in (1.0, 2.0, 6.0):
        meters.add({"loss": torch.tensor(value), "norm": torch.tensor(10 * value)})
    meters.add({"loss": torch.tensor(3.0)})
    assert meters.read(Ranks()) == {"loss": pytest.approx(3.0), "norm": pytest.approx(30.0)}
    assert meters.read(Ranks()) == {}
    meters.add({"loss": torch.tensor(5.0)})
    assert meters.read(Ranks()) == {"loss": 5.0}


def test_sums_are_kept_in_double_precision() -> None:
    meters = MetricMeans()
    for _ in range(3000):
        meters.add({"loss": torch.tensor(0.1)})
    exact = float(torch.tensor(0.1))
    assert meters.read(Ranks())["loss"] == pytest.approx(exact, rel=1e-12)


def test_gradients_are_let_go() -> None:
    meters = MetricMeans()
    value = torch.tensor(2.0, requires_grad=True)
    meters.add({"loss": value * 2})
    meters.add({"loss": value * 3})
    assert meters.state_dict() == {"rows": [(["loss"], [10.0, 2.0])]}


def test_restored_meters_go_on_bit_for_bit() -> None:
    values = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in range(9)]
    whole, first, second = MetricMeans(), MetricMeans(), MetricMeans()
    for value in values:
        whole.add({"loss": value})
    for value in values[:4]:
        first.add({"loss": value})
    second.load_state_dict(first.state_dict())
    for value in values[4:]:
        second.add({"loss": value})
    assert second.read(Ranks()) == whole.read(Ranks())


def test_means_go_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(self: Ranks, value: Any) -> list[Any]:  # of another teacher, with one step less
        return [value, [(["loss", "sam/spatial"], [9.0, 7.0, 1.0])]]

    monkeypatch.setattr(Ranks, "gather_objects", another)
    meters = MetricMeans()
    meters.add({"loss": torch.tensor(1.0), "clip/spatial": torch.tensor(2.0)})
    meters.add({"loss": torch.tensor(3.0), "clip/spatial": torch.tensor(3.0)})
    means = meters.read(Ranks(0, 2))
    assert means == {"loss": pytest.approx(13 / 3), "clip/spatial": 2.5, "sam/spatial": 7.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_left_out_is_in_no_mean(bad: float) -> None:
    meters = MetricMeans()
    meters.add({"loss": torch.tensor(2.0)}, torch.tensor(True))
    meters.add({"loss": torch.tensor(bad)}, torch.tensor(False))
    assert meters.read(Ranks()) == {"loss": 2.0}
    meters.add({"loss": torch.tensor(bad)}, torch.tensor(False))
    assert math.isnan(meters.read(Ranks())["loss"])


def test_what_several_ranks_kept_is_taken_up_by_one() -> None:
    rows = []
    for value in (1.0, 4.0):
        meters = MetricMeans()
        meters.add({"loss": torch.tensor(value)})
        rows += meters.state_dict()["rows"]
    meters = MetricMeans()
    meters.load_state_dict({"rows": rows})
    meters.add({"loss": torch.tensor(4.0)})
    assert meters.read(Ranks()) == {"loss": 3.0}


NAN, INF = float("nan"), float("inf")


def update(guard: NonFiniteMonitor, fine: bool, clip: float = 1.0, sam: float = 1.0) -> None:
    parts: list[dict[str, Tensor]] = [
        {"clip/spatial": torch.tensor(clip)},
        {"sam/spatial": torch.tensor(sam)},
    ]
    guard.update(torch.tensor(fine), parts)


def test_steps_and_names_since_the_last_reading() -> None:
    guard = NonFiniteMonitor(CPU)
    update(guard, True)
    update(guard, False, clip=NAN)
    update(guard, False)
    update(guard, True)
    assert guard.read(Ranks(), 4, 3) == SkippedSteps(2, 2, ("clip/spatial",))
    assert guard.read(Ranks(), 4, 3) == SkippedSteps(2, 0, ())
    update(guard, False, clip=INF, sam=-INF)
    found = guard.read(Ranks(), 5, 3)
    assert found == SkippedSteps(3, 1, ("clip/spatial", "sam/spatial"))
    assert found.describe() == "1 step was left out, not finite: clip/spatial, sam/spatial"
    update(guard, False)
    assert guard.read(Ranks(), 6, 3).describe() == (
        "1 step was left out, not finite: a gradient of finite losses"
    )


@pytest.mark.parametrize("readings", [(), (2,), (1, 2)])
def test_so_many_in_a_row_are_too_many(readings: tuple[int, ...]) -> None:
    """Whether or not some of them were read of before."""
    guard = NonFiniteMonitor(CPU)
    update(guard, False)
    update(guard, True)
    for step in range(1, 4):
        update(guard, False, sam=NAN)
        if step in readings:
            guard.read(Ranks(), step, 3)
    with pytest.raises(
        RadioError, match=r"step 9: 3 steps in a row were left out, not finite: sam/spatial; what"
    ):
        guard.check(9, 3)
    guard.check(9, 4)


def test_those_before_a_good_step_do_not_count() -> None:
    guard = NonFiniteMonitor(CPU)
    for fine in (False, False, True, False, False):
        update(guard, fine)
    guard.check(5, 3)
    assert guard.read(Ranks(), 5, 3).total == 4


def test_other_ranks_name_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, mine: [["dino/summary"], mine])
    guard = NonFiniteMonitor(CPU)
    update(guard, False, sam=NAN)
    assert guard.read(Ranks(1, 2), 1, 9).names == ("dino/summary", "sam/spatial")


def test_what_was_kept_goes_on() -> None:
    first, second = NonFiniteMonitor(CPU), NonFiniteMonitor(CPU)
    update(first, False, clip=NAN)
    update(first, False)
    second.load_state_dict(first.state_dict())
    update(second, False)
    with pytest.raises(RadioError, match="3 steps in a row were left out, not finite: clip/spatial"):
        second.read(Ranks(), 3, 3)
    assert second.read(Ranks(), 3, 4) == SkippedSteps(3, 3, ("clip/spatial",))


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
    watch = PhaseTimer(CPU)
    for _ in range(2):
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
    times = watch.read(2, waited=1.0)
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


def test_no_moment_counts_twice_for_the_groups(hand: Hand) -> None:
    watch = PhaseTimer(CPU)
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

    watch = PhaseTimer(CPU, last=layers[0].parameters())
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


SAM = TeacherConfig(name="sam", model="tiny:sam", batch_size=2, student_resolution=96)


@pytest.fixture
def two(config: TrainConfig) -> TrainConfig:
    """Two groups: eight images at 48 px, two at 96."""
    return replace(config, teachers=(TEACHERS[0], SAM), batch_size=8)


def test_the_figures_of_a_log_step(two: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    partition = make_partition(two, 1)
    pace = PerformanceMonitor(replace(two, peak_tflops=1e-3), partition, Ranks(), CPU, [])
    for _ in range(4):
        for name, seconds in (("clip", 1.0), ("sam", 3.0)):
            with pace.watch.time("forward", name):
                now[0] += seconds
        now[0] += 1.0
        pace.step(0.5)
    found = pace.read()
    assert (found["seconds"], found["images_per_second"], found["data_wait"]) == (20.0, 2.0, 0.1)
    assert (found["time/forward"], found["time/data"], found["perf/step_time/sam"]) == (4.0, 0.5, 3.0)
    assert (found["perf/images_per_rank/clip"], found["perf/images_per_rank/sam"]) == (8, 2)
    assert found["perf/idle_fraction"] == 0  # one process takes turns
    assert found["mfu"] == pytest.approx(4 * step_flops(two, partition) / (20 * 1e9))
    assert pace.in_words() == ""
    now[0] += 7.0
    pace.skip(5.0)  # an evaluation
    pace.step(0.0)
    again = pace.read()
    assert (again["seconds"], again["images_per_second"], again["data_wait"]) == (2.0, 5.0, 0.0)


def test_what_ranks_of_other_groups_measured(two: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Times(dict.fromkeys(PHASES, 0.0), {"sam": 4.0})] * 2

    def gather(self: Ranks, value: Any) -> list[Any]:
        return [Times(value.phases, {"clip": 1.0}), *others]

    monkeypatch.setattr(Ranks, "gather_objects", gather)
    config = replace(two, ranks_per_group=(1, 2))
    pace = PerformanceMonitor(config, make_partition(config, 3), Ranks(0, 3), CPU, [])
    pace.step(0.0)
    found = pace.read()
    assert found["perf/idle_fraction"] == pytest.approx(0.75 / 3)
    assert "mfu" not in found
    assert pace.in_words() == "clip 1 s a step, sam 4 s a step; ranks are idle 25% of the time"
    others[:] = [Times(dict.fromkeys(PHASES, 0.0), {"sam": 0.25})] * 2
    pace.step(0.0)
    pace.read()  # eight images of clip in a second on one rank, and one of sam in a quarter
    assert pace.in_words().endswith("--ranks-per-group 2 1 would take 0.5 s instead of 1")


def test_a_step_costs_the_same_on_any_ranks(two: TrainConfig) -> None:
    flops = [step_flops(two, make_partition(two, world)) for world in (1, 2, 3)]
    assert flops[0] == flops[1] == flops[2] > 0


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_logs_where_its_time_goes(two: TrainConfig, start: Start, ahead: bool) -> None:
    start(two, steps=4, log_every=2, peak_tflops=1.0, prefetch_teachers=ahead).train()
    for record in read_records(two.out):
        spent = {phase: record[f"time/{phase}"] for phase in PHASES}
        assert all(spent[phase] > 0 for phase in PHASES)
        student = spent["forward"] + spent["backward"] + spent["optimiser"] + spent["communication"]
        assert 0 < student < record["seconds"] / 2  # two steps a record
        groups = record["perf/step_time/clip"] + record["perf/step_time/sam"]
        busy = spent["teachers"] + spent["forward"] + spent["backward"]
        assert 0 < groups <= busy * (1 + 1e-9)
        if not ahead:  # nothing overlaps
            assert groups == pytest.approx(busy)
        assert 0 < record["mfu"] < 1

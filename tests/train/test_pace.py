"""Rates, busy groups and the devices' use, by a clock that the test sets."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from radio.dist import Group
from train.config import TeacherConfig, TrainConfig
from train.pace import PerformanceMonitor, step_flops
from train.partition import make_partition
from train.stopwatch import PHASES, Times

from .conftest import CPU, TEACHERS, Start, read_records

SAM = TeacherConfig(name="sam", model="tiny:sam", batch_size=2, student_resolution=96)


@pytest.fixture
def two(config: TrainConfig) -> TrainConfig:
    """Two groups: eight images at 48 px, two at 96."""
    return replace(config, teachers=(TEACHERS[0], SAM), batch_size=8)


def test_the_figures_of_a_log_step(two: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    partition = make_partition(two, 1)
    pace = PerformanceMonitor(replace(two, peak_tflops=1e-3), partition, Group(), CPU, [])
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


def test_what_ranks_of_other_groups_measured(two: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Times(dict.fromkeys(PHASES, 0.0), {"sam": 4.0})] * 2

    def gather(self: Group, value: Any) -> list[Any]:
        return [Times(value.phases, {"clip": 1.0}), *others]

    monkeypatch.setattr(Group, "gather_objects", gather)
    config = replace(two, ranks_per_group=(1, 2))
    pace = PerformanceMonitor(config, make_partition(config, 3), Group(0, 3), CPU, [])
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

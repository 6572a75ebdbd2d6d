"""Idle ranks, and splits that would have fewer of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from radio.errors import ConfigError, DataError
from train.config import SidesConfig
from train.groups import (
    Partition,
    Proposal,
    TeacherGroup,
    by_pixels,
    idle_share,
    idle_shares,
    make_partition,
    measured,
    propose,
    step_seconds,
)

from .test_partition import settings

TWO = settings(((24, 48), (24, 96)))


def test_idle_shares() -> None:
    partition = make_partition(replace(TWO, ranks_per_group=(4, 8)), 12)
    assert [len(group.ranks) for group in partition.groups] == [4, 8]
    seconds = {"t0": {48: 1.0}, "t1": {96: 4.0}}
    assert idle_shares(partition, seconds) == {"t0": 0.75, "t1": 0.0}
    assert idle_share(partition, seconds) == pytest.approx(0.75 * 4 / 12)


def test_in_turns_nobody_waits() -> None:
    partition = make_partition(settings(((24, 48), (24, 96)), teacher_placement="shared"), 4)
    seconds = {"t0": {48: 1.0}, "t1": {96: 4.0}}
    assert idle_share(partition, seconds) == idle_share(partition, {}) == 0
    assert propose(partition, seconds) is None
    assert propose(make_partition(settings(((24, 48),)), 4), {"t0": {48: 1.0}}) is None


def test_a_better_split() -> None:
    partition = make_partition(replace(TWO, ranks_per_group=(6, 6)), 12)
    assert [len(group.ranks) for group in partition.groups] == [6, 6]
    # An image costs 1/4 s and 1 s: four ranks take 1.5 s for their six, and eight take 3 s for their three.
    assert propose(partition, {"t0": {48: 1.0}, "t1": {96: 4.0}}) == Proposal((4, 8), 4.0, 3.0)
    assert propose(partition, {"t0": {48: 1.0}, "t1": {96: 1.1}}) is None


def test_a_better_split_of_a_mixture() -> None:
    """By the groups' means two and three ranks were best; but steps wait for t0 where it draws 240 px."""
    two = make_partition(replace(settings(((6, 48), (6, 168))), ranks_per_group=(2, 3)), 5)
    drawn = replace(two.groups[0], sides=(48, 240), weights=(3.0, 2.0))
    partition = replace(two, groups=(drawn, two.groups[1]))
    seconds = {"t0": {48: 3 * 48**2, 240: 3 * 240**2}, "t1": {168: 2 * 168**2}}
    before = 0.4 * 3 * 240**2 + 0.6 * 2 * 168**2
    after = 0.4 * 2 * 240**2 + 0.6 * 3 * 168**2
    proposal = propose(partition, seconds)
    assert proposal is not None and proposal.split == (3, 2)
    assert proposal[1:] == (pytest.approx(before), pytest.approx(after))
    assert step_seconds(partition, seconds) == pytest.approx(before)
    waits = {"t0": 1 - 3 * (0.6 * 48**2 + 0.4 * 240**2) / before, "t1": 1 - 2 * 168**2 / before}
    assert idle_shares(partition, seconds) == {name: pytest.approx(share) for name, share in waits.items()}
    means = {"t0": 3 * (0.6 * 48**2 + 0.4 * 240**2), "t1": 2 * 168**2}
    assert by_pixels(partition.groups, means) == {name: pytest.approx(each) for name, each in seconds.items()}
    teachers = settings(((6, 48), (6, 168))).teachers
    sides = SidesConfig(sides=drawn.sides, weights=drawn.weights)
    mixed = (replace(teachers[0], student_resolution=None, student_resolutions=sides), teachers[1])
    default = make_partition(replace(settings(((6, 48), (6, 168))), teachers=mixed), 5)
    assert [len(group.ranks) for group in default.groups] == [3, 2]


def write(path: Path, *records: dict[str, float]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_measured_times_are_for_this_partitions_shares(tmp_path: Path) -> None:
    first = {
        "step": 1,
        "perf/step_time/t0": 90.0,
        "perf/images_per_rank/t0": 12,
        "perf/step_time/t1": 90.0,
        "perf/images_per_rank/t1": 12,
    }
    second = {
        "step": 2,
        "perf/step_time/t0": 1.0,
        "perf/images_per_rank/t0": 12,
        "perf/step_time/t1": 3.0,
        "perf/images_per_rank/t1": 12,
    }
    third = {
        "step": 3,
        "perf/step_time/t0": 2.0,
        "perf/images_per_rank/t0": 12,
        "perf/step_time/t1": 3.0,
        "perf/images_per_rank/t1": 12,
    }
    partition = make_partition(replace(TWO, ranks_per_group=(6, 6)), 12)  # four images a rank for each
    found = measured(write(tmp_path / "m.jsonl", first, second, third), partition)
    assert found == {"t0": pytest.approx(0.5), "t1": pytest.approx(1.0)}
    assert measured(write(tmp_path / "m.jsonl", second), partition)["t1"] == pytest.approx(1.0)


def test_files_that_tell_nothing(tmp_path: Path) -> None:
    partition = make_partition(TWO, 12)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        measured(tmp_path / "none.jsonl", partition)
    with pytest.raises(DataError, match="no record times the groups"):
        measured(write(tmp_path / "m.jsonl", {"step": 1}), partition)
    other = write(tmp_path / "m.jsonl", {"step": 1, "perf/step_time/sam": 1.0, "perf/images_per_rank/sam": 4})
    with pytest.raises(ConfigError, match="times the groups sam, and this run has t0"):
        measured(other, partition)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"step": 1, "perf/step_time/a": "x", "perf/images_per_rank/a": 2}',
            "wanted numbers for perf/step_time/GROUP and perf/images_per_rank/GROUP",
        ),
        ('{"step": 1, "perf/step_time/a": null, "perf/images_per_rank/a": 2}', "wanted numbers"),
        (
            '{"step": 1, "perf/step_time/a": 1, "perf/images_per_rank/a": 0}',
            "a group that takes 1 s for 0 images",
        ),
        ('{"step": 1, "perf/step_time/a": -1, "perf/images_per_rank/a": 2}', "a group that takes -1 s"),
        ('{"step": 1, "perf/step_time/a": 1e300, "perf/images_per_rank/a": 2}', "a group that takes 1e"),
        ('{"step": 1, "perf/step_time/a": NaN, "perf/images_per_rank/a": 2}', "no record times the groups"),
        ("[" * 100_000, "no record times the groups"),
        ("", "no record times the groups"),
    ],
)
def test_a_log_of_other_hands_is_taken_or_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text + "\n")
    group = TeacherGroup(teachers=("a",), adaptors=("a",), sides=(8,), batch_size=2, first=0, ranks=(0,))
    with pytest.raises(DataError, match=message):
        measured(path, Partition(groups=(group,), world=1))
    with pytest.raises(DataError, match="is a folder"):
        measured(tmp_path, Partition(groups=(group,), world=1))

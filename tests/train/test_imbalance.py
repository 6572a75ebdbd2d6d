"""Idle ranks, and splits that would have fewer of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radio.errors import ConfigError, DataError
from train.imbalance import Proposal, idle_share, idle_shares, measured, propose
from train.partition import make_partition

from .test_partition import settings

TWO = settings(((24, 48), (24, 96)))


def test_idle_shares() -> None:
    partition = make_partition(TWO, 12, (1.0, 2.0))
    assert [len(group.ranks) for group in partition.groups] == [4, 8]
    seconds = {"t0": 1.0, "t1": 4.0}
    assert idle_shares(partition, seconds) == {"t0": 0.75, "t1": 0.0}
    assert idle_share(partition, seconds) == pytest.approx(0.75 * 4 / 12)


def test_in_turns_nobody_waits() -> None:
    partition = make_partition(settings(((24, 48), (24, 96)), partition="turns"), 4)
    seconds = {"t0": 1.0, "t1": 4.0}
    assert idle_share(partition, seconds) == 0
    assert propose(partition, seconds) is None
    assert propose(make_partition(settings(((24, 48),)), 4), {"t0": 1.0}) is None


def test_a_better_split() -> None:
    partition = make_partition(TWO, 12, (1.0, 1.0))
    assert [len(group.ranks) for group in partition.groups] == [6, 6]
    # A picture costs 1/4 s and 1 s: four ranks take 1.5 s for their six, and eight take 3 s for their three.
    assert propose(partition, {"t0": 1.0, "t1": 4.0}) == Proposal((4, 8), 4.0, 3.0)
    assert propose(partition, {"t0": 1.0, "t1": 1.1}) is None


def write(path: Path, *records: dict[str, float]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_measured_times_are_for_this_partitions_shares(tmp_path: Path) -> None:
    first = {"step": 1, "seconds/t0": 90.0, "share/t0": 12, "seconds/t1": 90.0, "share/t1": 12}
    second = {"step": 2, "seconds/t0": 1.0, "share/t0": 12, "seconds/t1": 3.0, "share/t1": 12}
    third = {"step": 3, "seconds/t0": 2.0, "share/t0": 12, "seconds/t1": 3.0, "share/t1": 12}
    partition = make_partition(TWO, 12, (1.0, 1.0))  # four pictures a rank for each
    found = measured(write(tmp_path / "m.jsonl", first, second, third), partition)
    assert found == {"t0": pytest.approx(0.5), "t1": pytest.approx(1.0)}
    assert measured(write(tmp_path / "m.jsonl", second), partition)["t1"] == pytest.approx(1.0)


def test_files_that_tell_nothing(tmp_path: Path) -> None:
    partition = make_partition(TWO, 12)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        measured(tmp_path / "none.jsonl", partition)
    with pytest.raises(DataError, match="no record times the groups"):
        measured(write(tmp_path / "m.jsonl", {"step": 1}), partition)
    other = write(tmp_path / "m.jsonl", {"step": 1, "seconds/sam": 1.0, "share/sam": 4})
    with pytest.raises(ConfigError, match="times the groups sam, and this run has t0"):
        measured(other, partition)

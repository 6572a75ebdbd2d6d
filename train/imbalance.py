"""How evenly the groups of teachers keep their ranks busy, and the split that would keep them busier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from radio.errors import ConfigError, DataError

from .partition import Partition, best_split
from .records import read_records

_SHORTEST = 1e-12  # seconds a step, pictures: what is beyond is no run's


class Proposal(NamedTuple):
    """Another split of the ranks, and how long a step takes with each."""

    split: tuple[int, ...]  # ranks of each group
    before: float  # seconds a step of the slowest group
    after: float


def idle_shares(partition: Partition, seconds: Mapping[str, float]) -> dict[str, float]:
    """The share of a step in which each group's ranks wait for the slowest: in [0, 1), by the group's name.

    `seconds` are what a step takes one rank of each group. In turns nobody waits.
    """
    groups = partition.groups
    if all(group.ranks == groups[0].ranks for group in groups):
        return {group.name: 0.0 for group in groups}
    slowest = max(seconds[group.name] for group in groups)
    return {group.name: 1 - seconds[group.name] / slowest for group in groups}


def idle_share(partition: Partition, seconds: Mapping[str, float]) -> float:
    """The share of all ranks' time that is spent waiting for the slowest group."""
    idle = idle_shares(partition, seconds)
    weights = {group.name: len(group.ranks) for group in partition.groups}
    return sum(idle[name] * count for name, count in weights.items()) / sum(weights.values())


def propose(partition: Partition, seconds: Mapping[str, float]) -> Proposal | None:
    """The split whose slowest group is fastest, where that is another one than the partition's.

    `seconds` are what a step takes one rank of each group, by the group's name; a group's time is taken to
    be proportional to the pictures of its ranks. None in turns, and where no split is faster.
    """
    groups = partition.groups
    if len(groups) == 1 or all(group.ranks == groups[0].ranks for group in groups):
        return None
    prices = [seconds[group.name] / group.share for group in groups]
    split = best_split(groups, partition.world, prices)
    before = max(seconds[group.name] for group in groups)
    after = max(
        price * group.batch_size / count for price, group, count in zip(prices, groups, split, strict=True)
    )
    return Proposal(split, before, after) if after < before else None


def measured(path: Path, partition: Partition) -> dict[str, float]:
    """Seconds a step of one rank of each group, from a run's `metrics.jsonl`, for this partition's shares.

    The mean over the records but the first, in which kernels are still being chosen.

    Raises:
        DataError: no such file, or none of its records times the groups.
        ConfigError: the run had other groups of teachers.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; give the metrics.jsonl of a run of the same teachers")
    records = read_records(path)
    timed = [record for record in records if any(key.startswith("seconds/") for key in record)]
    if not timed:
        raise DataError(f"{path}: no record times the groups of teachers (seconds/GROUP)")
    found = {}
    for group in partition.groups:
        keys = (f"seconds/{group.name}", f"share/{group.name}")
        if any(key not in record for key in keys for record in timed):
            known = sorted(key.removeprefix("seconds/") for key in timed[0] if key.startswith("seconds/"))
            raise ConfigError(f"{path}: times the groups {', '.join(known)}, and this run has {group.name}")
        prices = [_price(record[keys[0]], record[keys[1]], path) for record in timed[1:] or timed]
        found[group.name] = group.share * sum(prices) / len(prices)
    return found


def _price(seconds: object, share: object, path: Path) -> float:
    """Seconds that one picture takes a rank."""
    if not isinstance(seconds, (int, float)) or not isinstance(share, (int, float)):
        raise DataError(f"{path}: wanted numbers for seconds/GROUP and share/GROUP; is it a run's log?")
    if not (_SHORTEST < seconds < 1 / _SHORTEST and _SHORTEST < share < 1 / _SHORTEST):
        raise DataError(f"{path}: a group that takes {seconds} s for {share} pictures; is it a run's log?")
    return seconds / share

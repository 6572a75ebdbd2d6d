"""Imbalance between the groups of teachers: idle time of their ranks, and a faster split of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from radio.errors import ConfigError, DataError

from .loggers import read_records
from .partition import Partition, best_split

_SHORTEST = 1e-12  # seconds per step, and images: no run is below, or above the inverse


class Proposal(NamedTuple):
    """Another split of the ranks, and the time of a step with the current and the new one."""

    split: tuple[int, ...]  # ranks of each group
    before: float  # seconds per step of the slowest group
    after: float


def idle_shares(partition: Partition, seconds: Mapping[str, float]) -> dict[str, float]:
    """Compute each group's share of a step spent waiting for the slowest: in [0, 1), by the group's name.

    `seconds` are the times of a step on one rank of each group. With shared placement no rank waits.
    """
    groups = partition.groups
    if all(group.ranks == groups[0].ranks for group in groups):
        return {group.name: 0.0 for group in groups}
    slowest = max(seconds[group.name] for group in groups)
    return {group.name: 1 - seconds[group.name] / slowest for group in groups}


def idle_share(partition: Partition, seconds: Mapping[str, float]) -> float:
    """Compute the share of all ranks' time spent waiting for the slowest group."""
    idle = idle_shares(partition, seconds)
    weights = {group.name: len(group.ranks) for group in partition.groups}
    return sum(idle[name] * count for name, count in weights.items()) / sum(weights.values())


def propose(partition: Partition, seconds: Mapping[str, float]) -> Proposal | None:
    """Propose the split whose slowest group is fastest, if it is faster than the partition's.

    `seconds` are the times of a step on one rank of each group, by the group's name; a group's time is taken
    to be proportional to its images per rank. None with shared placement, and where no split is faster.
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
    """Read each group's seconds per step on one rank from `metrics.jsonl`, scaled to this partition.

    The mean over all records but the first, which includes the choice of kernels.

    Raises:
        DataError: there is no such file, or no record has the groups' times.
        ConfigError: the run had other groups of teachers.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; give the metrics.jsonl of a run of the same teachers")
    records = read_records(path)
    timed = [record for record in records if any(key.startswith("perf/step_time/") for key in record)]
    if not timed:
        raise DataError(f"{path}: no record times the groups of teachers (perf/step_time/GROUP)")
    found = {}
    for group in partition.groups:
        keys = (f"perf/step_time/{group.name}", f"perf/images_per_rank/{group.name}")
        if any(key not in record for key in keys for record in timed):
            known = sorted(
                key.removeprefix("perf/step_time/") for key in timed[0] if key.startswith("perf/step_time/")
            )
            raise ConfigError(f"{path}: times the groups {', '.join(known)}, and this run has {group.name}")
        prices = [_price(record[keys[0]], record[keys[1]], path) for record in timed[1:] or timed]
        found[group.name] = group.share * sum(prices) / len(prices)
    return found


def _price(seconds: object, share: object, path: Path) -> float:
    """Compute a rank's seconds per image."""
    if not isinstance(seconds, (int, float)) or not isinstance(share, (int, float)):
        raise DataError(
            f"{path}: wanted numbers for perf/step_time/GROUP and perf/images_per_rank/GROUP; is it a "
            f"run's log?"
        )
    if not (_SHORTEST < seconds < 1 / _SHORTEST and _SHORTEST < share < 1 / _SHORTEST):
        raise DataError(f"{path}: a group that takes {seconds} s for {share} images; is it a run's log?")
    return seconds / share

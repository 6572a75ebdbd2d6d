"""The teacher caches of a run: their contents, and the user's confirmation of their size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console

from radio.dist import Group
from radio.errors import RadioError
from radio.types import Teacher

from .batches import crop_sides
from .cache import CacheJob, GroupedCaches, open_caches
from .config import TrainConfig
from .crops import FixedCrops
from .images import ConcatImages
from .loggers import ProgressConsole, say
from .partition import Partition

_LARGE = 1e9  # bytes; above this the user has to confirm


def cache_jobs(
    config: TrainConfig,
    partition: Partition,
    group: Group,
    data: ConcatImages,
    teachers: Mapping[str, Teacher],
    sizes: Mapping[str, tuple[int, int]],
    device: torch.device,
) -> dict[str, CacheJob]:
    """Describe the caches of this rank's groups of teachers, by the group's name."""
    options = config.cache
    assert options.folder is not None, "asked for only where there is a cache"
    count = min(options.images or len(data), len(data))
    jobs = {}
    for some, side in zip(partition.groups, crop_sides(partition, sizes), strict=True):
        if group.rank in some.ranks:
            crops = FixedCrops(data, config.data, side, config.seed, count, options.crops)
            own = {name: teachers[name] for name in some.teachers}
            jobs[some.name] = CacheJob(options.folder, own, sizes, crops, device)
    return jobs


def fill_caches(
    config: TrainConfig, jobs: Mapping[str, CacheJob], partition: Partition, group: Group, console: Console
) -> GroupedCaches:
    """Open the caches with a progress bar; write what is missing first.

    Raises:
        RadioError: more than 1 GB would be written without confirmation; or as `open_caches`.
    """

    def confirm(size: int) -> None:
        _confirm(config, size, console)

    with ProgressConsole(console, "teacher cache", sum(len(job.crops) for job in jobs.values()), 0) as bar:
        return open_caches(
            jobs,
            partition,
            group,
            workers=config.data.workers,
            confirm=confirm,
            progress=bar.advance,
            tell=lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False),
        )


def _confirm(config: TrainConfig, size: int, console: Console) -> None:
    line = f"teacher cache: {size / 1e9:.2f} GB in {config.cache.folder}"
    say(console, line)
    if size <= _LARGE or not config.cache.confirm:
        return
    if not console.is_terminal:
        raise RadioError(f"a teacher cache of {size / 1e9:.1f} GB would be written; agree with --yes")
    if console.input("write it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise RadioError(
            "the teacher cache was not written; leave --cache.folder out to run the teachers online"
        )

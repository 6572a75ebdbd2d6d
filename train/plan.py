"""Plan of a run at a given number of ranks: each rank's work and memory, and the run's duration.

Nothing is loaded or run: operations and bytes are counted on models without weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, final

from torch import nn

from radio.config import Count, check_options
from radio.errors import ConfigError
from radio.model import RadioModel

from .assembly import check_settings, partition_ranks
from .config import PositiveShare, Ranks, TrainConfig
from .cost import Cost, Outline, bytes_of, count, outline
from .imbalance import Proposal, idle_share, idle_shares, measured, propose
from .parallel import blocks_of
from .partition import Partition, TeacherGroup

PAPERS_RANKS = 64  # paper §4
A100 = 312.0  # TFLOP/s in bfloat16 without sparsity


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Assumptions of a plan."""

    world: Ranks | None = None  # number of ranks; None = the paper's 64 if they can share the batches, else 1
    utilisation: PositiveShare = 0.4  # share of --peak-tflops (default: an A100's 312) that a rank reaches
    images: Count | None = None  # images in the data, for the number of passes; None = unknown, except scenes
    measured: Path | None = None  # metrics.jsonl of a run with these teachers, to use its times


class Memory(NamedTuple):
    """Memory of one rank in bytes."""

    weights: int  # student and adaptors, or the rank's shard of them
    teachers: int  # frozen weights, matrices in bfloat16 where forwards are; no text towers
    optimiser: int  # AdamW's two moments
    average: int  # moving average of the weights (--ema)
    gradients: int
    exchange: int  # DDP's buckets, or what FSDP2 gathers: two blocks and the weights outside
    inputs: int  # images and teachers' features, also of the next step with prefetch
    activations: int  # at the peak of the student's forward
    working: int  # at the peak of the teachers' forward, beyond their features
    peak: int  # of the total; gradients and activations may peak at different times


class Kind(NamedTuple):
    """A set of ranks with the same groups."""

    groups: tuple[TeacherGroup, ...]
    num_ranks: int
    memory: Memory


@final
@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run: work, memory and time."""

    config: TrainConfig
    options: PlanOptions
    partition: Partition
    costs: dict[str, Cost]  # for one rank of each group, by the group's name
    kinds: tuple[Kind, ...]
    sizes: dict[str, tuple[int, int]]  # input size (height, width) of each teacher
    half: bool

    @property
    def peak_tflops(self) -> float:
        """Peak TFLOP/s of one rank's device."""
        return self.config.peak_tflops or A100

    @property
    def flops(self) -> int:
        """Operations per step over all ranks."""
        return sum(len(group.ranks) * self.costs[group.name].flops for group in self.partition.groups)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds per step on one rank of each group: measured, or from its operations."""
        if self.options.measured is not None:
            return measured(self.options.measured, self.partition)
        speed = self.peak_tflops * 1e12 * self.options.utilisation
        return {name: cost.flops / speed for name, cost in self.costs.items()}

    @property
    def step_seconds(self) -> float:
        """Seconds per step of the slowest rank."""
        return max(sum(self.seconds[group.name] for group in kind.groups) for kind in self.kinds)

    @property
    def days(self) -> float:
        """Days for all steps."""
        return self.config.steps * self.step_seconds / 86400

    @property
    def passes(self) -> float | None:
        """Number of passes over the data; None where the number of images is unknown."""
        images = self.options.images or (self.config.data.scenes if _only_scenes(self.config) else 0)
        return self.config.steps * self.partition.batch_size / images if images else None

    @property
    def idle(self) -> float:
        """The share of all ranks' time spent waiting for the slowest group."""
        return idle_share(self.partition, self.seconds)

    @property
    def idle_shares(self) -> dict[str, float]:
        """Share of a step that each group's ranks wait for the slowest group."""
        return idle_shares(self.partition, self.seconds)

    @property
    def proposal(self) -> Proposal | None:
        """A faster split of the ranks; None where there is none."""
        return propose(self.partition, self.seconds)


def make_plan(config: TrainConfig, options: PlanOptions) -> RunPlan:
    """Make the plan of a run; takes a few seconds for small students, half a minute for a ViT-H.

    Raises:
        ConfigError: the settings are inconsistent, or the ranks cannot share the batches.
        SizeError: a teacher or the student cannot take its resolution.
    """
    check_options(options)
    world = _world(config) if options.world is None else options.world
    check_settings(config, world)
    partition = partition_ranks(config, world)
    half = config.precision == "bf16" or (config.precision == "auto" and config.device != "cpu")
    models = outline(config, half=half and config.device != "cpu")
    dealt = list(dict.fromkeys(group.ranks for group in partition.groups))
    sets = [tuple(group for group in partition.groups if group.ranks == ranks) for ranks in dealt]
    costs = {
        group.name: count(config, models, group, half=half, standing=_standing(config, groups))
        for groups in sets
        for group in groups
    }
    kinds = [
        Kind(groups, len(groups[0].ranks), _memory(config, models, groups, costs, world, half=half))
        for groups in sets
    ]
    return RunPlan(
        config=config,
        options=options,
        partition=partition,
        costs=costs,
        kinds=tuple(kinds),
        sizes={name: facts.size for name, facts in models.facts.items()},
        half=half,
    )


def _standing(config: TrainConfig, groups: tuple[TeacherGroup, ...]) -> bool:
    """Check whether gradients are allocated in a rank's costliest forward: several per step, or sharded."""
    return len(groups) > 1 or config.grad_accum_steps > 1 or config.parallel == "fsdp"


def _memory(
    config: TrainConfig,
    models: Outline,
    groups: tuple[TeacherGroup, ...],
    costs: dict[str, Cost],
    world: int,
    *,
    half: bool,
) -> Memory:
    mine = [costs[group.name] for group in groups]
    held = models.of(*groups)
    student, adaptors = bytes_of(held.student), bytes_of(held.adaptors)
    sharded = config.parallel == "fsdp"
    kept = (math.ceil(student / world) if sharded else student) + adaptors
    average = kept if config.ema else 0
    buckets = student if world > 1 else 0
    exchange = _gathered(held, half=half) if sharded else buckets
    online = config.cache.folder is None
    teachers = sum(bytes_of(models.teachers[name]) for group in groups for name in group.teachers)
    working = max(cost.teacher_working for cost in mine)
    ahead = online and config.prefetch_teachers
    inputs = sum(cost.inputs for cost in mine) * (2 if ahead else 1)
    passing = max(cost.peak - (cost.copies if sharded else 0) for cost in mine)
    passing += kept if _standing(config, groups) else 0
    busy = passing + working if ahead else max(passing, working)
    return Memory(
        weights=kept,
        teachers=teachers,
        optimiser=2 * kept,
        average=average,
        gradients=kept,
        exchange=exchange,
        inputs=inputs,
        activations=max(cost.activations - (cost.copies if sharded else 0) for cost in mine),
        working=working,
        peak=3 * kept + average + teachers + exchange + inputs + busy,
    )


def _gathered(model: RadioModel, *, half: bool) -> int:
    """Return the bytes that FSDP2 gathers at a time: whole weights, and a block's gradient in exchange."""
    student = model.student
    assert isinstance(student, nn.Module)
    blocks = [bytes_of(block) for block in blocks_of(student)]
    largest, outside = max(blocks, default=0), bytes_of(student) - sum(blocks)
    return (2 * largest + outside) // (2 if half else 1) + 2 * largest


def _world(config: TrainConfig) -> int:
    try:
        partition_ranks(config, PAPERS_RANKS)
    except ConfigError:
        return 1
    return PAPERS_RANKS


def _only_scenes(config: TrainConfig) -> bool:
    return not config.data.shards and not config.data.images

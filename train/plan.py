"""Plan of a run at a given number of ranks: each rank's operations and memory, and the run's duration.

Nothing is loaded or run: every operator of teachers, student, adaptors and losses runs on fake tensors, which
have shapes but no values. They pass as CPU tensors, so that autocast and fused attention are those of a real
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from radio.benchmark import CostCounter
from radio.config import check_options
from radio.errors import ConfigError, shown
from radio.hub import load_teacher
from radio.model import RadioModel
from radio.types import Teacher

from .config import PlanOptions, TrainConfig
from .data.loader import GroupBatch, for_student
from .distributed import StudentPass, blocks_of
from .groups import (
    Partition,
    SideSeconds,
    TeacherGroup,
    TeacherSizes,
    idle_share,
    idle_shares,
    make_partition,
    measured,
    propose,
    step_seconds,
)
from .loggers import say
from .losses import DistillationLoss, make_balancer
from .mesa import AveragedStudent
from .mosaic import tiles_per_side
from .normalise import make_statistics
from .optim import muon_weights
from .reparametrise import noisy_layers
from .setup import (
    TeacherFacts,
    check_names,
    check_settings,
    choose_windows,
    make_framing,
    make_lean,
    model_config,
    teacher_features,
    teacher_sizes,
)
from .shift import Framing

PAPERS_RANKS = 64  # paper §4
A100 = 312.0  # TFLOP/s in bfloat16 without sparsity


class Cost(NamedTuple):
    """Cost of one rank's images of a group in one step."""

    teacher_flops: int  # 0 with a teacher cache
    forward_flops: int  # student, adaptors and losses
    backward_flops: int
    inputs: int  # bytes of the images and of the teachers' features
    teacher_working: int  # bytes beyond weights and features at the peak of the teachers' forward
    activations: int  # bytes beyond weights and inputs at the peak of the student's forward
    peak: int  # over forward and backward, gradients included unless allocated before
    copies: int  # bytes in both peaks: weights in half precision

    @property
    def flops(self) -> int:
        """All operations."""
        return self.teacher_flops + self.forward_flops + self.backward_flops


class Memory(NamedTuple):
    """Memory of one rank in bytes, but for the weights that spectral and noisy layers compute in forwards."""

    weights: int  # student and adaptors, or the rank's shard of them
    teachers: int  # frozen weights, matrices in bfloat16 where forwards are; no text towers
    optimiser: int  # AdamW's and LAMB's two moments; Muon has one of its matrices
    average: int  # moving average of the weights (--ema)
    noise: int  # factors of the student's linear weights (--damp), whole also with shards
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


class Mosaics(NamedTuple):
    """A teacher's mosaics on one rank and in one step."""

    images: int  # of its group
    tiles: Mapping[int, int]  # images in a forward, by the student's side
    flops: int  # of a forward

    def forwards(self, side: int) -> int:
        """Number of forwards at a side of the student."""
        return math.ceil(self.images / self.tiles[side])


@final
@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run: work, memory and time."""

    config: TrainConfig
    options: PlanOptions
    partition: Partition
    costs: dict[str, Cost]  # for one rank of each group, by the group's name; see `mix`
    flops_at: dict[str, dict[int, int]]  # of these, at each side of the student
    kinds: tuple[Kind, ...]
    sizes: TeacherSizes
    mosaics: Mapping[str, Mosaics]  # by the teacher's name
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
    def side_seconds(self) -> SideSeconds:
        """Seconds per step on one rank of each group, at each of its sides: `seconds`, by the operations."""
        return {
            name: {side: self.seconds[name] * (flops / self.costs[name].flops) for side, flops in at.items()}
            for name, at in self.flops_at.items()
        }

    @cached_property
    def step_seconds(self) -> float:
        """Mean seconds per step of the slowest rank; each group draws its side by itself."""
        return step_seconds(self.partition, self.side_seconds)

    @property
    def days(self) -> float:
        """Days for all steps."""
        return self.config.steps * self.step_seconds / 86400

    @property
    def passes(self) -> float | None:
        """Number of passes over the data; None where the number of images is unknown."""
        data = self.config.data
        images = self.options.images or (0 if data.shards or data.images else data.scenes)
        return self.config.steps * self.partition.batch_size / images if images else None


def make_plan(config: TrainConfig, options: PlanOptions) -> RunPlan:
    """Make the plan of a run; takes a few seconds for small students, half a minute for a ViT-H.

    Raises:
        ConfigError: the settings are inconsistent, or the ranks cannot share the batches.
        SizeError: a teacher or the student cannot take its resolution.
    """
    check_options(options)
    check_names(config)
    partition = check_settings(config, options.world or _default_world(config))
    half = config.precision == "bf16" or (config.precision == "auto" and config.device != "cpu")
    models = build_meta_models(config, half=half and config.device != "cpu")
    costs: dict[str, Cost] = {}
    flops_at: dict[str, dict[int, int]] = {}
    kinds = []
    for ranks in dict.fromkeys(group.ranks for group in partition.groups):
        groups = tuple(group for group in partition.groups if group.ranks == ranks)
        # Gradients are allocated in a rank's costliest forward if there are several per step, or shards.
        standing = len(groups) > 1 or config.grad_accum_steps > 1 or config.parallel == "fsdp"
        for group in groups:
            at = {
                side: count(config, models, group, side, half=half, standing=standing) for side in group.sides
            }
            costs[group.name] = mix(group, at)
            flops_at[group.name] = {side: cost.flops for side, cost in at.items()}
        memory = _memory(config, models, partition, groups, costs, half=half, standing=standing)
        kinds.append(Kind(groups, len(ranks), memory))
    return RunPlan(
        config=config,
        options=options,
        partition=partition,
        costs=costs,
        flops_at=flops_at,
        kinds=tuple(kinds),
        sizes={name: facts.sizes for name, facts in models.facts.items()},
        mosaics={
            t.name: _count_mosaics(models, t.name, group.share, half=half)
            for group in partition.groups
            for t in config.teachers
            if t.mosaic and t.name in group.teachers
        },
        half=half,
    )


def step_flops(config: TrainConfig, partition: Partition) -> int:
    """Count the operations of a step over all ranks; takes a few seconds for small students."""
    models = build_meta_models(config)
    total = 0.0
    for group in partition.groups:
        for side, share in group.side_shares.items():
            cost = count(config, models, group, side, half=False, standing=True)
            total += len(group.ranks) * share * cost.flops
    return round(total)


def mix(group: TeacherGroup, at: Mapping[int, Cost]) -> Cost:
    """Combine a group's costs at each side of the student: mean operations, and the most bytes."""
    shares, fields = group.side_shares, Cost._fields
    values = {name: {side: getattr(cost, name) for side, cost in at.items()} for name in fields}
    return Cost(
        **{
            name: round(sum(shares[side] * value for side, value in by_side.items()))
            if name.endswith("flops")
            else max(by_side.values())
            for name, by_side in values.items()
        }
    )


def _default_world(config: TrainConfig) -> int:
    try:
        make_partition(config, PAPERS_RANKS)
    except ConfigError:
        return 1
    return PAPERS_RANKS


class MetaModels(NamedTuple):
    """Student, adaptors and teachers of a run without weights."""

    model: RadioModel
    teachers: dict[str, Teacher]
    facts: dict[str, TeacherFacts]
    framing: Framing | None
    windows: dict[int, tuple[int, ...]]  # to sample from, per side of the student's input
    mode: FakeTensorMode  # mode in which they can be called

    def adaptors(self, groups: Sequence[TeacherGroup]) -> list[nn.Module]:
        """Return the adaptors of these groups."""
        names = dict.fromkeys(name for group in groups for name in group.adaptors)
        return [self.model.get_submodule(f"adaptors.{name}") for name in names]


def build_meta_models(config: TrainConfig, *, half: bool = False) -> MetaModels:
    """Build a run's models without weights; no file is read where the teacher's family permits it.

    Args:
        config: the run's settings.
        half: forwards run in bfloat16, so frozen matrices are stored in it.

    Raises:
        ConfigError: the student or a teacher is unknown, or settings contradict each other; or as
            `make_framing`.
        SizeError: a teacher or the student cannot take its resolution.
    """
    loaded = {t.name: load_teacher(t.model, meta=True) for t in config.teachers if t.adaptor is None}
    teachers = {t.name: loaded[t.adaptor_name] for t in config.teachers}
    for teacher in loaded.values():
        make_lean(teacher, config, half=half)
    sizes = teacher_sizes(config, teachers)
    facts = {
        name: TeacherFacts("", sizes[name], teacher.summary_dim, teacher.token_dim, teacher.patch_size)
        for name, teacher in teachers.items()
    }
    with torch.device("meta"):
        model = RadioModel(model_config(config, facts)).train()
    windows = choose_windows(model.student, config)
    # If a process's first backward is on fake tensors, processes forked from it cannot run a backward.
    torch.ones((), requires_grad=True).exp().backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in (model, *loaded.values()):
            assert isinstance(module, nn.Module)
            module.to_empty(device="cpu")  # allocates nothing: the mode keeps only shapes
    return MetaModels(model, teachers, facts, make_framing(config, facts), windows, mode)


def count(
    config: TrainConfig, models: MetaModels, group: TeacherGroup, side: int, *, half: bool, standing: bool
) -> Cost:
    """Count the cost of one rank's images of a group, with the largest window that a step may draw.

    Args:
        config: the run's settings.
        models: from `build_meta_models`.
        group: gives the teachers and the number of images.
        side: the student's, in pixels.
        half: run matrix products in bfloat16, as autocast does on a GPU.
        standing: gradients are already allocated, by another group or part of the same step.
    """
    model = models.model
    student: Any = model.student
    teachers = {name: models.teachers[name] for name in group.teachers}
    sizes = {name: models.facts[name].sizes[side] for name in teachers}
    frames = None if models.framing is None else models.framing.unshifted(group, side)  # compares all tokens
    crop = max(side, *(max(size) for size in sizes.values())) if frames is None else frames.crop_side
    window = max(models.windows[side], default=None)
    online = config.cache.folder is None
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    selected = [teacher for teacher in config.teachers if teacher.name in group.teachers]
    with models.mode, without_fast_paths():
        images = torch.empty(group.share, 3, crop, crop)
        with CostCounter() as of_teachers, autocast:
            mosaics = {t.name: (0, 0) for t in selected if t.mosaic}
            targets = teacher_features(teachers, sizes, images, mosaics, frames and frames.teachers)
        features = sum(_size(target.summary) + _size(target.tokens) for target in targets.values())
        part, *_ = GroupBatch(group, images, targets).split(config.grad_accum_steps)
        crops = model.sample_crops(len(part.images), torch.Generator())
        balancer = make_balancer(config.balance, selected, model.summary_dim)
        facts = {name: models.facts[name] for name in (*group.teachers, *group.adaptors)}  # and the owners
        statistics = make_statistics(
            config, {name: (f.summary_dim, f.token_dim) for name, f in facts.items()}
        )
        loss = DistillationLoss(model, selected, config.loss, balancer, statistics, config.mesa)
        step = StudentPass(student)
        average = AveragedStudent(step, dict(step.named_parameters())) if config.mesa else None
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if standing else None
        with CostCounter() as counter:
            with autocast:
                own = for_student(part.images, frames.student if frames else side)
                second = for_student(part.images, frames.average) if frames and config.mesa else None
                resized = part._replace(images=own, crops=crops, frames=frames, second=second)
                losses = loss(step, resized, window, False, average)
            forward_flops, activations = counter.flops, counter.peak
            losses.total.backward()
        for parameter in model.parameters():
            parameter.grad = None
    parts = config.grad_accum_steps
    matrices = [p for m in (student, *models.adaptors([group])) for p in m.parameters() if p.ndim > 1]
    return Cost(
        teacher_flops=of_teachers.flops if online else 0,
        forward_flops=parts * forward_flops,
        backward_flops=parts * (counter.flops - forward_flops),
        inputs=_size(images) + features,
        teacher_working=of_teachers.peak - features if online else 0,
        activations=activations,
        peak=counter.peak,
        # Autocast caches the half-precision weights until the backward ends.
        copies=sum(2 * parameter.numel() for parameter in matrices) if half else 0,
    )


def _count_mosaics(models: MetaModels, name: str, images: int, *, half: bool) -> Mosaics:
    teacher, sizes = models.teachers[name], models.facts[name].sizes
    tiles = {side: tiles_per_side(teacher, tile) ** 2 for side, (tile, _) in sizes.items()}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with models.mode, without_fast_paths(), CostCounter() as counter, autocast:
        teacher(torch.empty(1, 3, *teacher.native_size))
    return Mosaics(images, tiles, counter.flops)


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Disable torch's fused attention kernels for inference, which the counter has no formulas for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _memory(
    config: TrainConfig,
    models: MetaModels,
    partition: Partition,
    groups: tuple[TeacherGroup, ...],
    costs: dict[str, Cost],
    *,
    half: bool,
    standing: bool,
) -> Memory:
    own = [costs[group.name] for group in groups]
    held, world = partition.peers(groups[0].ranks[0]), partition.world
    student: Any = models.model.student
    whole = bytes_of(student)
    sharded = config.parallel == "fsdp"
    weights = math.ceil(whole / world) if sharded else whole
    weights += sum(bytes_of(adaptor) for adaptor in models.adaptors(held))
    exchange = whole if world > 1 else 0  # DDP's buckets
    if sharded:  # FSDP2 gathers whole weights, and a block's gradient in exchange
        blocks = [bytes_of(block) for block in blocks_of(student)]
        largest, outside = max(blocks, default=0), whole - sum(blocks)
        exchange = (2 * largest + outside) // (2 if half else 1) + 2 * largest
    optimiser = 2 * weights
    if config.optim.kind == "muon":
        own_modules = [(student, world if sharded else 1), *((each, 1) for each in models.adaptors(held))]
        optimiser -= sum(_size(weight) // n for module, n in own_modules for weight in muon_weights(module))
    average = weights if config.ema else 0
    noise = sum(_size(layer.weight) for layer in noisy_layers(models.model).values()) if config.damp else 0
    loaded = {id(teacher): teacher for g in groups for teacher in map(models.teachers.get, g.teachers)}
    teachers = sum(map(bytes_of, loaded.values()))
    working = max(cost.teacher_working for cost in own)
    prefetches = config.cache.folder is None and config.prefetch_teachers
    inputs = sum(cost.inputs for cost in own) * (2 if prefetches else 1)
    passes = max(cost.peak - (cost.copies if sharded else 0) for cost in own) + (weights if standing else 0)
    busy = passes + working if prefetches else max(passes, working)
    return Memory(
        weights=weights,
        teachers=teachers,
        optimiser=optimiser,
        average=average,
        noise=noise,
        gradients=weights,
        exchange=exchange,
        inputs=inputs,
        activations=max(cost.activations - (cost.copies if sharded else 0) for cost in own),
        working=working,
        peak=weights + optimiser + average + noise + teachers + exchange + inputs + busy,
    )


def bytes_of(module: Any) -> int:
    """Return the bytes of a module's parameters and buffers."""
    assert isinstance(module, nn.Module)
    return sum(_size(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print a table with a column per group, and a line for every figure of the whole run."""
    world = plan.partition.world
    ranks = f"{world} ranks" if world > 1 else "1 rank"
    turns = ", the groups in turn" if len(plan.kinds) < len(plan.partition.groups) else ""
    title = f"{plan.config.recipe}: {plan.config.student} on {ranks}{turns}, {plan.config.parallel}"
    table = Table(title=Text(shown(title)), box=box.ROUNDED if console.is_terminal else box.ASCII)
    table.add_column("teachers")
    for name in (*(group.name for group in plan.partition.groups), "all"):
        table.add_column(Text(shown(name)), justify="right")
    _add_work(table, plan)
    table.add_section()
    _add_memory(table, plan)
    console.print(table)
    for line in _lines(plan):
        say(console, line)


def sum_up(plans: Sequence[RunPlan]) -> str:
    """Format the steps, days and images of all stages of a run in a line."""
    days = sum(plan.days for plan in plans)
    hours = sum(plan.days * 24 * plan.partition.world for plan in plans)
    steps = sum(plan.config.steps for plan in plans)
    samples = sum(plan.config.steps * plan.partition.batch_size for plan in plans)
    return (
        f"all {len(plans)} stages: {steps} steps in {days:.4g} days; {hours:.4g} hours of one device; "
        f"{samples} images"
    )


def _add_work(table: Table, plan: RunPlan) -> None:
    groups, costs = plan.partition.groups, [plan.costs[group.name] for group in plan.partition.groups]
    size, letter = _scale(max(cost.flops for cost in costs))

    def row(name: str, values: Sequence[object], whole: object = "") -> None:
        table.add_row(name, *map(str, values), str(whole))

    sizes = [
        " ".join(_listed(height for height, _ in plan.sizes[t].values()) for t in group.teachers)
        for group in groups
    ]
    row("their pixels", sizes)
    row("the student's pixels", [_listed(group.sides) for group in groups])
    row("ranks", [len(group.ranks) for group in groups], plan.partition.world)
    row("images a rank and step", [group.share for group in groups])
    row("images a step", [group.batch_size for group in groups], plan.partition.batch_size)
    for part in ("teacher", "forward", "backward"):
        counts = [getattr(cost, f"{part}_flops") for cost in costs]
        row(f"{letter}FLOP a rank and step, {part}", [f"{count / size:.3g}" for count in counts])
    row("seconds a step", [f"{plan.seconds[g.name]:.3g}" for g in groups], f"{plan.step_seconds:.3g}")
    idle = idle_shares(plan.partition, plan.side_seconds)
    whole = idle_share(plan.partition, plan.side_seconds)
    row("idle", [f"{idle[group.name]:.0%}" for group in groups], f"{whole:.0%}")


def _listed(numbers: Iterable[int]) -> str:
    """Format different numbers as `96/144`, or `128-432` if they are many."""
    different = list(dict.fromkeys(numbers))
    return "/".join(map(str, different)) if len(different) < 3 else f"{min(different)}-{max(different)}"


def _add_memory(table: Table, plan: RunPlan) -> None:
    size, letter = _scale(max(kind.memory.peak for kind in plan.kinds))
    for part in Memory._fields:
        amounts = [getattr(kind.memory, part) for kind in plan.kinds]
        if any(amounts):
            cells = [f"{amount / size:.3g}" for amount in amounts]
            blanks = [""] * (len(table.columns) - 1 - len(cells))
            # Where all ranks are alike, the only figure stands in the last column.
            cells = [*blanks, *cells] if len(plan.kinds) == 1 else [*cells, *blanks]
            table.add_row(f"{letter}B on a rank, {part}", *cells)


def _scale(largest: float) -> tuple[float, str]:
    """Return the divisor for a number and its unit prefix."""
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    return next(((size, letter) for size, letter in scales if largest >= size), scales[-1])


def _lines(plan: RunPlan) -> Iterator[str]:
    config = plan.config
    size, letter = _scale(plan.flops)
    products = "bfloat16" if plan.half else "float32"
    yield f"operations: {plan.flops / size:.4g} {letter}FLOP a step, matrix products in {products}"
    if plan.options.measured is not None:
        pace = f"as {plan.options.measured} measured"
    else:
        peak = "--peak-tflops" if config.peak_tflops else "an A100's; give --peak-tflops"
        pace = f"at {plan.options.utilisation:.0%} of {plan.peak_tflops:g} TFLOP/s ({peak})"
    for group in plan.partition.groups:
        for name in group.teachers:
            if name in plan.mosaics:
                yield _describe(name, plan.mosaics[name], group)
    units = ((1.0, "days"), (1 / 24, "hours"), (1 / 1440, "minutes"), (1 / 86400, "seconds"))
    days, unit = next((pair for pair in units if plan.days >= pair[0]), units[-1])
    hours = plan.days * 24 * plan.partition.world
    amount = plan.days / days
    time = f"{amount:.1f} {unit}" if amount >= 1 else f"{amount:.2g} {unit}"
    yield f"time: {config.steps} steps in {time} {pace}; {hours:.4g} hours of one device"
    samples = config.steps * plan.partition.batch_size
    if plan.passes is None:
        yield f"data: {samples} images; give --images, how many there are, for the number of passes"
    else:
        yield f"data: {samples} images, {plan.passes:.3g} passes"
    if (better := propose(plan.partition, plan.side_seconds)) is not None:
        split = " ".join(map(str, better.split))
        yield f"faster: --ranks-per-group {split}, {better.after:.3g} s a step instead of {better.before:.3g}"
    elif len(plan.kinds) > 1:
        yield "no other --ranks-per-group is faster"


def _describe(name: str, mosaics: Mosaics, group: TeacherGroup) -> str:
    """Describe a teacher's mosaics, and what they save on all ranks of its group, in a line."""
    images = mosaics.images
    each = ", ".join(f"{mosaics.forwards(side)} at {side} px" for side in group.sides)
    saved = sum(share * (images - mosaics.forwards(side)) for side, share in group.side_shares.items())
    flops = len(group.ranks) * saved * mosaics.flops
    size, letter = _scale(flops)
    return (
        f"mosaics: forwards of {name} for a rank's {images} images: {each}; one by one they would take "
        f"{flops / size:.4g} {letter}FLOP more a step"
    )

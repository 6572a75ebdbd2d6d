"""The settings of one distillation run. Every field is a command-line option of the same name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from radio.config import Count, CountOrZero, NotNegative, Pixels, Positive, Seed, Share, Workers
from radio.students import StudentOptions

BatchSize: TypeAlias = Annotated[int, Interval(ge=1, le=1 << 20)]  # 32,768 is the largest that is published
Decay: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
PositiveShare: TypeAlias = Annotated[float, Interval(gt=0, le=1)]
Aspect: TypeAlias = Annotated[float, Interval(ge=0.01, le=100)]
Side: TypeAlias = Annotated[int, Interval(ge=1, le=1024)]  # in tokens
Width: TypeAlias = Annotated[int, Interval(ge=1, le=1 << 16)]  # of a hidden layer
Ranks: TypeAlias = Annotated[int, Interval(ge=1, le=1 << 16)]
Weight: TypeAlias = Annotated[float, Interval(gt=0, le=1e12)]
LossWeight: TypeAlias = Annotated[float, Interval(ge=0, le=1e6)]
Rate: TypeAlias = Annotated[float, Interval(ge=0, le=1e3)]
Tflops: TypeAlias = Annotated[float, Interval(ge=1e-6, le=1e6)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One teacher, and what its losses are worth."""

    name: str  # the adaptor's name: clip, dino, sam
    model: str  # a spec such as scenes:clip or openclip:ViT-H-14-quickgelu@FILE
    resolution: Pixels | None = None  # its input side in pixels; None = its native size
    student_resolution: Pixels | None = None  # what the student sees beside it; None = the run's resolution
    batch_size: BatchSize | None = (
        None  # pictures a step over all ranks; None = the run's (paper §4: fewer for SAM)
    )
    fingerprint: str | None = None  # of its weights, as a checkpoint's card has it; others are refused
    summary_weight: LossWeight = 1.0  # lambda of eq. 2
    spatial_weight: LossWeight = 1.0  # gamma of eq. 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Pictures to learn from; labels are never read."""

    shards: tuple[str, ...] = ()  # tar files, URLs or pipe:COMMAND; {000000..000003} stands for many
    images: tuple[Path, ...] = ()  # folders of pictures, searched through and through
    scenes: Annotated[int, Interval(ge=0, le=10**7)] = 0  # pictures of the generated world; the demo's source
    weights: tuple[
        Weight, ...
    ] = ()  # share of a batch of each pattern, folder, then scenes; () = in one pool
    scenes_seed: Seed = 2  # teachers were trained on seed 1, evaluators use seed 0
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0)  # RandomResizedCrop: share of the area
    crop_aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    flip: Share = 0.5  # probability of a horizontal flip
    lanes: BatchSize = 1024  # cursors per group, fixed for a run: the largest divisor of its batch up to this
    workers: Workers = 2  # loader processes per rank; 0 loads in the trainer itself
    max_broken: Share = 0.01  # stop when a larger share of the pictures, or of the shards, cannot be read


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Eq. 3: alpha * cosine + beta * smooth L1, per token."""

    cosine: LossWeight = 0.9
    smooth_l1: LossWeight = 0.1
    knee: LossWeight = 1.0  # where smooth L1 turns linear (PyTorch's default; the paper does not say)


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How the losses of the teachers are balanced (paper §3.3.1, appendix D), on top of their own weights."""

    kind: Literal["naive", "uncertainty", "adaloss", "amtml"] = "naive"
    regularizer_scale: Positive = (
        1.0  # uncertainty: factor of softplus(b) in eq. 6 (ours; the paper's is lost)
    )
    momentum: Decay = 0.99  # adaloss: of the moving averages in eq. 7


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorOptions:
    """The adaptors of all teachers."""

    hidden: Width | None = None  # hidden width; None = the student's token width
    resample: Literal["before", "after"] = "before"  # to the teacher's grid, before or after the head


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine annealing (paper §4; decay and warm-up are ours)."""

    lr: Rate = 1e-3
    weight_decay: Rate = 0.02
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    warmup: Share = 0.01  # share of all steps
    final_lr: Share = 0.0  # where the cosine ends, as a share of lr
    clip: NotNegative = 1.0  # largest gradient norm; 0 = no clipping


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Teacher features computed once for fixed crops, then trained from (for slow teachers)."""

    folder: Path | None = None  # None = teachers run online
    crops: Count = 1  # fixed crops per picture
    pictures: Count | None = None  # how many pictures of the data to take; None = all
    confirm: bool = True  # say the size and ask before writing more than 1 GB; --cache.no-confirm goes ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run."""

    recipe: str
    student: str
    teachers: tuple[TeacherConfig, ...]
    resolution: Pixels  # the student's input side in pixels
    steps: Count
    batch_size: BatchSize  # pictures a step over all ranks, for the teachers that name no other number
    out: Path
    options: StudentOptions = field(default_factory=StudentOptions)
    summary: Literal["shared", "per-teacher", "mean"] = (
        "shared"  # one class token, one per teacher, average pooling
    )
    windows: tuple[Side, ...] = (
        6,
        7,
        8,
        9,
        12,
        14,
        16,
        18,
    )  # sides to sample from; those that fit the grid are used
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    adaptor: AdaptorOptions = field(default_factory=AdaptorOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    partition: Literal["ranks", "turns"] = "ranks"  # a group of teachers has ranks of its own, or all in turn
    split: tuple[Ranks, ...] = ()  # ranks of each group; () = chosen by cost
    engine: Literal["ddp", "fsdp"] = "ddp"  # over ranks: copies of the student, or its weights sharded
    accumulate: Count = 1  # parts that a rank's pictures go through the student in, one after another
    ema: Decay = 0.0  # decay of a moving average of the weights, in ckpt-ema.pt; 0 = none
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on a CPU
    peak_tflops: Tflops | None = None  # what one rank's device can do; None = no MFU in the log
    compile: bool = False  # torch.compile every block of the student
    teachers_ahead: bool = True  # online teachers see the next batch, in a thread of their own, during a step
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()  # for the log, beside metrics.jsonl
    log_every: Count = 20  # steps
    save_every: Count = 200  # steps
    keep_last: Count = 2  # states to go on from: so many of the newest
    keep_every: CountOrZero = 0  # steps; the states of those are kept for good; 0 = none
    eval_every: CountOrZero = 0  # steps; the student is evaluated after each so many of them; 0 = never
    eval_tasks: tuple[str, ...] = ("knn", "zeroshot")  # by which evaluators
    max_skipped: Count = 10  # stop when so many steps in a row are left out, their gradients not being finite
    score: tuple[str, ...] = ()  # tasks that the run ends with, for student, untrained student and teachers

"""The settings of one distillation run. Every field is a command-line option of the same name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from radio.students import StudentOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One teacher, and what its losses are worth."""

    name: str  # the adaptor's name: clip, dino, sam
    model: str  # a spec such as scenes:clip or openclip:ViT-H-14-quickgelu@FILE
    resolution: int | None = None  # its input side in pixels; None = its native size
    student_resolution: int | None = None  # what the student sees beside it; None = the run's resolution
    batch_size: int | None = (
        None  # pictures a step over all ranks; None = the run's (paper §4: fewer for SAM)
    )
    fingerprint: str | None = None  # of its weights, as a checkpoint's card has it; others are refused
    summary_weight: float = 1.0  # lambda of eq. 2
    spatial_weight: float = 1.0  # gamma of eq. 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Pictures to learn from; labels are never read."""

    shards: tuple[str, ...] = ()  # tar files, URLs or pipe:COMMAND; {000000..000003} stands for many
    images: tuple[Path, ...] = ()  # folders of pictures, searched through and through
    scenes: int = 0  # pictures of the generated world; the demo's source
    weights: tuple[float, ...] = ()  # share of a batch of each pattern, folder, then scenes; () = in one pool
    scenes_seed: int = 2  # teachers were trained on seed 1, evaluators use seed 0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # RandomResizedCrop: share of the area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5  # probability of a horizontal flip
    lanes: int = 1024  # cursors per group, fixed for a run: the largest divisor of its batch up to this
    workers: int = 2  # loader processes per rank; 0 loads in the trainer itself
    max_broken: float = 0.01  # stop when a larger share of the pictures, or of the shards, cannot be read


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Eq. 3: alpha * cosine + beta * smooth L1, per token."""

    cosine: float = 0.9
    smooth_l1: float = 0.1
    knee: float = 1.0  # where smooth L1 turns linear (PyTorch's default; the paper does not say)


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How the losses of the teachers are balanced (paper §3.3.1, appendix D), on top of their own weights."""

    kind: Literal["naive", "uncertainty", "adaloss", "amtml"] = "naive"
    regularizer_scale: float = 1.0  # uncertainty: factor of softplus(b) in eq. 6 (ours; the paper's is lost)
    momentum: float = 0.99  # adaloss: of the moving averages in eq. 7


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorOptions:
    """The adaptors of all teachers."""

    hidden: int | None = None  # hidden width; None = the student's token width
    resample: Literal["before", "after"] = "before"  # to the teacher's grid, before or after the head


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine annealing (paper §4; decay and warm-up are ours)."""

    lr: float = 1e-3
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.01  # share of all steps
    final_lr: float = 0.0  # where the cosine ends, as a share of lr
    clip: float = 1.0  # largest gradient norm; 0 = no clipping


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Teacher features computed once for fixed crops, then trained from (for slow teachers)."""

    folder: Path | None = None  # None = teachers run online
    crops: int = 1  # fixed crops per picture
    pictures: int | None = None  # how many pictures of the data to take; None = all
    confirm: bool = True  # say the size and ask before writing more than 1 GB; --cache.no-confirm goes ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run."""

    recipe: str
    student: str
    teachers: tuple[TeacherConfig, ...]
    resolution: int  # the student's input side in pixels
    steps: int
    batch_size: int  # pictures a step over all ranks, for the teachers that name no other number
    out: Path
    options: StudentOptions = field(default_factory=StudentOptions)
    summary: Literal["shared", "per-teacher", "mean"] = (
        "shared"  # one class token, one per teacher, average pooling
    )
    windows: tuple[int, ...] = (
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
    split: tuple[int, ...] = ()  # ranks of each group; () = chosen by cost
    engine: Literal["ddp", "fsdp"] = "ddp"  # over ranks: copies of the student, or its weights sharded
    accumulate: int = 1  # parts that a rank's pictures go through the student in, one after another
    ema: float = 0.0  # decay of a moving average of the weights, in ckpt-ema.pt; 0 = none
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on a CPU
    peak_tflops: float | None = None  # what one rank's device can do; None = no MFU in the log
    compile: bool = False  # torch.compile every block of the student
    teachers_ahead: bool = True  # online teachers see the next batch, in a thread of their own, during a step
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()  # for the log, beside metrics.jsonl
    log_every: int = 20  # steps
    save_every: int = 200  # steps
    keep_last: int = 2  # states to go on from: so many of the newest
    keep_every: int = 0  # steps; the states of those are kept for good; 0 = none
    eval_every: int = 0  # steps; the student is evaluated after each so many of them; 0 = never
    eval_tasks: tuple[str, ...] = ("knn", "zeroshot")  # by which evaluators
    max_skipped: int = 10  # stop when so many steps in a row are left out, their gradients not being finite
    score: tuple[str, ...] = ()  # tasks that the run ends with, for student, untrained student and teachers

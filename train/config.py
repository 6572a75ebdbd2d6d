"""The settings of one distillation run. Every field is a command-line option of the same name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro
from annotated_types import Interval

from radio.config import Count, CountOrZero, NotNegative, Pixels, Positive, Seed, Share, Workers
from radio.students import OptionsField, StudentOptions

from .tasks import TasksField

BatchSize: TypeAlias = Annotated[int, Interval(ge=1, le=1 << 20)]  # 32,768 is the largest published one
Decay: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
ShareBelowOne: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
PositiveShare: TypeAlias = Annotated[float, Interval(gt=0, le=1)]
Aspect: TypeAlias = Annotated[float, Interval(ge=0.01, le=100)]
Side: TypeAlias = Annotated[int, Interval(ge=1, le=1024)]  # in tokens
Width: TypeAlias = Annotated[int, Interval(ge=1, le=1 << 16)]  # of a hidden layer
NumRanks: TypeAlias = Annotated[int, Interval(ge=1, le=1 << 16)]
Weight: TypeAlias = Annotated[float, Interval(gt=0, le=1e12)]
LossWeight: TypeAlias = Annotated[float, Interval(ge=0, le=1e6)]
ShiftDeviation: TypeAlias = Annotated[float, Interval(ge=0, le=16)]  # in patches
Rate: TypeAlias = Annotated[float, Interval(ge=0, le=1e3)]
Met: TypeAlias = Annotated[float, Interval(ge=1, le=1e6)]  # per image taken
Damp: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
Tflops: TypeAlias = Annotated[float, Interval(ge=1e-6, le=1e6)]

MESA_START = 0.1  # default of `mesa_start`


@dataclass(frozen=True, kw_only=True, slots=True)
class SidesConfig:
    """Input sides of the student, one of which is drawn for every step (RADIOv2.5, C-RADIOv4)."""

    sides: tuple[Pixels, ...] = ()  # in pixels; () = one resolution alone
    weights: tuple[Weight, ...] = ()  # how often each is drawn, of any sum; () = equally often


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One teacher and the weights of its losses."""

    name: str  # name of its adaptor and its losses, such as clip, dino or sam
    adaptor: str | None = None
    """Train the adaptor of this other entry, the same model in another group; None = its own."""
    model: str  # a spec such as scenes:clip or openclip:ViT-H-14-quickgelu@FILE
    resolution: Pixels | None = None  # input side in pixels; None = its native size
    student_resolution: Pixels | None = None  # student's input side; None = the run's, one or several
    student_resolutions: SidesConfig = field(default_factory=SidesConfig)  # several, instead of one
    same_grid: bool = False
    """Get images that give as many tokens as the student has in that step; resolution is the largest side."""
    batch_size: BatchSize | None = None
    """Images per step over all ranks; None = the run's (paper §4: fewer for SAM)."""
    mosaic: bool = False  # lay several of the student's images into one input of a teacher of one size (SAM)
    fingerprint: str | None = None  # expected fingerprint of its weights; None = any
    summary_weight: LossWeight = 1.0  # lambda of eq. 2
    spatial_weight: LossWeight = 1.0  # gamma of eq. 3

    @property
    def adaptor_name(self) -> str:
        """Name of the adaptor that its losses train."""
        return self.adaptor or self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Images of large clusters taken more rarely, so that a run sees all clusters alike (C-RADIOv2)."""

    folder: Path | None = None  # NAME.tsv for each shard and folder of images; None = all images alike
    power: PositiveShare = 1.0
    """Of a cluster of n images a share ~ n^-power is taken (our choice); 1 = all clusters alike."""
    max_met: Met = 10.0  # images scanned for each one taken, at most: small clusters count as larger


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training images; labels are never read."""

    shards: tuple[str, ...] = ()  # tar files, URLs or pipe:COMMAND; {000000..000003} is expanded
    images: tuple[Path, ...] = ()  # folders of images, searched recursively
    scenes: Annotated[int, Interval(ge=0, le=10**7)] = 0  # number of images of the generated world
    weights: tuple[Weight, ...] = ()  # share of the batch per pattern, folder, then scenes; () = one pool
    clusters: ClusterConfig = field(default_factory=ClusterConfig)
    scenes_seed: Seed = 2  # the teachers were trained on seed 1, evaluators use seed 0
    scenes_domain: Literal["own", "night", "web", "mixture"] = "own"
    """How scenes look: as the teachers know them, dark, as noisy web images, or all of these."""
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0)  # RandomResizedCrop: range of the area
    crop_aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    flip: Share = 0.5  # probability of a horizontal flip; ours
    num_streams: BatchSize = 1024
    """Data streams per group, fixed for a run: the largest divisor of its batch up to this."""
    workers: Workers = 2  # loader processes per rank; 0 = load in the trainer
    max_error_fraction: Share = 0.01  # stop if a larger share of images, or of shards, cannot be read


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Eq. 2, a distance of the summaries, and eq. 3: alpha * cosine + beta * smooth L1, per token."""

    summary: Literal["cosine", "l1", "mse", "smooth-l1", "angle"] = "cosine"
    """The paper compared the first four (§3.3); smooth-l1 uses smooth_l1_beta; angle: C-RADIOv4."""
    dispersion: Literal["fixed", "running"] = "fixed"
    """For angle: measured before the first step, or over all steps so far."""
    cosine: LossWeight = 0.9
    smooth_l1: LossWeight = 0.1
    smooth_l1_beta: LossWeight = 1.0  # where smooth L1 becomes linear (PyTorch's default; not in the paper)
    shift: ShiftDeviation = 0.0
    """Each model sees its frame shifted by round(N(0, this)) patches (C-RADIOv4: 0.5); 0 = not, else at least
    0.15, below which hardly any is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How the teachers' losses are balanced (paper §3.3.1, appendix D), on top of the configured weights."""

    kind: Literal["naive", "uncertainty", "adaloss", "amtml"] = "naive"
    regularizer_scale: Positive = 1.0
    """For uncertainty: factor of softplus(b) in eq. 6 (our choice; the paper gives none)."""
    momentum: Decay = 0.99  # adaloss: momentum of the moving averages in eq. 7


@dataclass(frozen=True, kw_only=True, slots=True)
class NormaliseConfig:
    """Teachers' tokens standardised, so that every teacher's spatial loss has one scale (PHI-S)."""

    kind: Literal["none", "phi-s", "global", "channel", "pca", "zca"] = "none"
    """Others than none: the mean squared error of standardised tokens instead of eq. 3."""
    steps: Count = 100  # first steps whose images are measured before training (PHI-S: 3,000)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorOptions:
    """The adaptors of all teachers."""

    hidden: Width | None = None  # hidden width; None = the student's token width
    resample: Literal["before", "after"] = "before"  # resample to the teacher's grid before or after the head


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning rate with linear warm-up (paper §4: AdamW, cosine; the rest is ours)."""

    kind: Literal["adamw", "muon", "lamb"] = "adamw"
    """Muon: for linear layers and kernels; lamb: for all that decays; AdamW for the rest."""
    lr: Rate = 1e-3
    weight_decay: Rate = 0.02
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    warmup: Share = 0.01  # share of all steps
    schedule: Literal["cosine", "linear"] = "cosine"  # the decay after the warm-up
    final_lr: Share = 0.0  # final learning rate as a share of lr
    clip: NotNegative = 1.0  # maximal gradient norm; 0 = no clipping


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Teacher features computed once for fixed crops, then trained from (for slow teachers)."""

    folder: Path | None = None  # cache folder; None = teachers run online
    crops: Count = 1  # fixed crops per image
    images: Count | None = None  # number of images to cache; None = all
    confirm: bool = True  # ask before writing more than 1 GB (--cache.no-confirm: do not ask)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A further stage of a run, from the weights of the one before, with a new optimizer and schedule."""

    steps: Count
    resolution: Pixels | None = None  # None = as in the stage before, also below
    resolutions: SidesConfig | None = None
    batch_size: BatchSize | None = None
    teachers: tuple[TeacherConfig, ...] = ()  # all of this stage; () = as in the stage before
    optim: OptimConfig | None = None
    freeze_trunk_steps: CountOrZero = 0  # first steps of the stage in which only the adaptors learn


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one run."""

    recipe: str
    student: str
    teachers: tuple[TeacherConfig, ...]
    resolution: Pixels  # the student's input side in pixels
    steps: Count
    batch_size: BatchSize  # images per step over all ranks, for teachers without their own
    out: Path
    resolutions: SidesConfig = field(default_factory=SidesConfig)
    """Sides that are drawn for the steps; resolution then only says at which ckpt.pt is used by default."""
    options: Annotated[OptionsField, tyro.conf.arg(name="student")] = field(default_factory=StudentOptions)
    init: str | None = None  # first weights: a checkpoint, timm:NAME@FILE or radio:FILE; None = random ones
    freeze_trunk_steps: CountOrZero = 0  # first steps in which only the adaptors learn
    summary: Literal["shared", "per-teacher", "mean"] = "shared"
    """One class token, one per teacher, or average pooling."""
    windows: tuple[Side, ...] = (
        6,
        7,
        8,
        9,
        12,
        14,
        16,
        18,
    )
    """Window sides to sample from; those that divide the grid are used."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    adaptor: AdaptorOptions = field(default_factory=AdaptorOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    teacher_placement: Literal["dedicated", "shared"] = "dedicated"
    """Separate ranks per group of teachers, or all ranks for each group."""
    ranks_per_group: tuple[NumRanks, ...] = ()  # ranks per group; () = chosen by cost
    parallel: Literal["ddp", "fsdp"] = "ddp"  # replicate or shard the student
    grad_accum_steps: Count = 1  # gradient accumulation: parts of a rank's batch
    spectral: bool = False  # learn linear layers' weights as a direction and a largest singular value (PHI-S)
    damp: Damp = 0.0  # deviation of the noise on linear weights (value: our choice); 0 = none
    ema: Decay = 0.0  # decay of the weights' moving average, in ckpt-ema.pt; 0 = none
    mesa: LossWeight = 0.0
    """Weight of the MESA loss: the distance of the student's tokens from those of its averaged weights
    (C-RADIOv4; the value is our choice); 0 = off."""
    mesa_start: ShareBelowOne = MESA_START
    """Share of a stage's steps before the MESA loss starts (our choice)."""
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto = bf16 on CUDA, fp32 on a CPU
    peak_tflops: Tflops | None = None  # peak TFLOP/s of one rank's device; None = no MFU in the log
    compile: bool = False  # apply torch.compile to every block of the student
    prefetch_teachers: bool = True  # run online teachers on the next batch in a thread, during a step
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # in addition to metrics.jsonl
    log_every: Count = 20  # steps between log records
    save_every: Count = 200  # steps between saves
    keep_last: Count = 2  # number of newest training states to keep
    keep_every: CountOrZero = 0  # also keep the states of every so many steps; 0 = none
    eval_every: CountOrZero = 0  # steps between evaluations of the student; 0 = never
    eval_tasks: tuple[str, ...] = ("knn", "zeroshot")  # evaluators to run
    max_nonfinite_steps: Count = 10  # stop after so many skipped steps in a row (non-finite gradients)
    score: tuple[str, ...] = ()  # tasks at the end, for student, untrained student, teachers
    data_root: Path | None = None
    """A data.yaml that names data sets, or their folder; None = the generated world."""
    tasks: TasksField = field(default_factory=dict)  # settings of tasks other than their defaults, by name
    stages: tuple[StageConfig, ...] = ()  # further stages, trained after that of the settings above


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Assumptions of a plan."""

    world: NumRanks | None = None
    """Number of ranks; None = the paper's 64 if they can share the batches, else 1."""
    utilisation: PositiveShare = 0.4  # share of --peak-tflops (default: an A100's 312) that a rank reaches
    images: Count | None = None  # images in the data, for the number of passes; None = unknown, except scenes
    measured: Path | None = None  # metrics.jsonl of a run with these teachers, to use its times


# Fields whose command-line options have another name; a task's have no more than its own.
RENAMED = {"options": "student", "tasks": ""}


def run_name(config: TrainConfig) -> str:
    """Return the run's name: that of its folder, also when given as `.` or `..`."""
    return config.out.resolve().name if config.out.name in ("", "..") else config.out.name

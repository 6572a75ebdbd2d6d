"""What a table consists of: its lines, the runs behind them, and what each run is scored on.

A table is one of the paper's, whose lines have the paper's numbers beside them, or one of claims, whose lines
say in which columns they should be higher or lower than another line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from evals.core.paper import PaperRow
from radio.config import AttentionWindow, Pixels
from radio.errors import ConfigError, did_you_mean
from radio.students import StudentOptions, resolve_options

from ..config import TrainConfig

Size: TypeAlias = Literal["paper", "small"]
Claim: TypeAlias = Literal["higher", "lower", ""]
"""How a score is claimed to differ from another line's; empty: compared, and nothing is claimed."""
Runs: TypeAlias = Mapping[str, TrainConfig]
"""The settings of runs by name."""


class Source(NamedTuple):
    """Where the values of a column come from."""

    task: str
    data_set: str  # at the paper's size, by its name in data.yaml
    metric: str  # of the task's report
    title: str  # of the column in small, where the paper's name would mislead


TEACHERS = ("clip", "dense", "sam")
"""Names of the teachers in tables of claims."""
SIDES = (48, 72, 96, 144, 192)
"""Sides in pixels at which tables of claims score their students, which learn at 96 px, or also at 192."""

SOURCES: Mapping[str, Source] = {
    "zeroshot": Source("zeroshot", "imagenet", "top1", "zero-shot"),
    "knn": Source("knn", "imagenet", "top1", "k-NN"),
    "ade20k": Source("seg", "ade20k", "miou", "probe"),
    "voc": Source("seg", "voc", "miou", "probe"),
    "coco": Source("sam", "coco", "miou", "SAM"),
    "gqa": Source("vqa", "llava", "gqa", "GQA-like"),
    "sqa": Source("vqa", "llava", "scienceqa", "SQA-like"),
    "textvqa": Source("vqa", "llava", "textvqa", "TextVQA-like"),
    "vqav2": Source("vqa", "llava", "vqav2", "VQAv2-like"),
    "unexplained": Source("fidelity", "imagenet", "unexplained", "unexplained, mean"),
    **{
        f"unexplained-{teacher}": Source(
            "fidelity", "imagenet", f"unexplained_{teacher}", f"unexplained: {teacher}"
        )
        for teacher in TEACHERS
    },
    **{
        f"angle-{teacher}": Source("fidelity", "imagenet", f"angle_{teacher}", f"angle: {teacher}")
        for teacher in TEACHERS
    },
    **{
        f"{task}-index": Source("resolution", "imagenet", f"{task}_index", f"{title}, worst of best side")
        for task, title in (("knn", "k-NN"), ("zeroshot", "zero-shot"))
    },
    **{
        f"{task}-{side}px": Source("resolution", "imagenet", f"{task}_top1_{side}px", f"{title}, {side} px")
        for task, title in (("knn", "k-NN"), ("zeroshot", "zero-shot"))
        for side in SIDES
    },
    "pattern": Source("pattern", "imagenet", "reproduced", "pattern reproduced"),
}
"""The columns that evaluators fill: the paper's, and those of claims, in percent."""

SPREADS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "unexplained-spread": (("unexplained-clip", "unexplained-dense", "unexplained-sam"), "unexplained"),
    "angle-spread": (("angle-clip", "angle-dense"), "angle"),
}
"""Columns of how far apart others are, the largest minus the smallest, and what those have in common."""

VQA = ("gqa", "sqa", "textvqa", "vqav2")
OTHERS = ("zeroshot", "knn", "ade20k")

LOSSES = ("summary_loss", "feature_loss")
OF_THE_RUN = (*LOSSES, "parameters", "images_per_second")
"""The paper's columns that need no evaluator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a table: a student that a run trains, or a frozen teacher."""

    label: str
    paper: PaperRow | None = None  # the paper's line; None where it has none
    run: str = ""  # the run whose student it shows
    model: str = ""  # of a teacher: its spec
    paper_model: str = ""  # name of the architecture in the paper's table 6, for its speed
    window: AttentionWindow | None = None  # in which the model is evaluated; None = its own
    against: str = ""  # label of the line that it is compared with
    columns: tuple[str, ...] = ()  # only these of the table; () = all
    claims: Mapping[str, Claim] = field(default_factory=dict)  # by column, of the difference to `against`


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Columns that are points of one curve."""

    title: str
    x: tuple[float, ...]
    columns: tuple[str, ...]  # one for each x


@dataclass(frozen=True, kw_only=True, slots=True)
class TableLayout:
    """A table of the paper at one size, or of claims."""

    name: str  # such as table3
    title: str
    size: Size
    base: TrainConfig  # the settings that its runs share
    columns: tuple[str, ...]  # the paper's, as in `evals.core.paper`, or others of `SOURCES`
    lines: tuple[Line, ...]
    make_runs: Callable[[TrainConfig], Runs]  # from the base with command-line overrides
    num_seeds: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of tasks, in this table alone
    speed_resolution: Pixels | None = None  # of students whose speed is measured; None = as in training
    remarks: tuple[str, ...] = ()  # what is ours in it
    by_request: tuple[str, ...] = ()  # tasks that are scored where --score names them
    curves: tuple[Curve, ...] = ()

    def evaluation(self, line: Line, column: str) -> Evaluation | None:
        """Return the evaluation that fills a cell; None where the run itself does, or nothing.

        A teacher is scored where the paper scored it: DINOv2 has no text tower.
        """
        source = SOURCES.get(column)
        if source is None or (line.columns and column not in line.columns):
            return None
        if line.model and line.paper is not None and column not in line.paper.values:
            return None
        return Evaluation(
            task=source.task,
            data_set=source.data_set if self.size == "paper" else "",
            window=line.window,
            options=tuple(self.options.get(source.task, {}).items()),
        )

    def evaluations(self, lines: Iterable[Line]) -> list[Evaluation]:
        """Return what the models of these lines are scored on, without repetition."""
        found = (self.evaluation(line, column) for line in lines for column in self.columns)
        return list(dict.fromkeys(each for each in found if each is not None))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that its columns need."""
        return tuple(dict.fromkeys(SOURCES[column].task for column in self.columns if column in SOURCES))

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the tasks that its runs score by default."""
        return tuple(task for task in self.tasks if task not in self.by_request)

    @property
    def makes_claims(self) -> bool:
        """Whether its lines are compared with claims, and not with the paper's numbers."""
        return any(line.claims for line in self.lines)

    @property
    def measures_speed(self) -> bool:
        """Whether the table has a column of images per second."""
        return "images_per_second" in self.columns


class Evaluation(NamedTuple):
    """A task on a data set, as one table has it."""

    task: str
    data_set: str = ""  # by its name in data.yaml; empty = the generated world
    window: AttentionWindow | None = None
    options: tuple[tuple[str, Any], ...] = ()  # settings that replace those of the run

    @property
    def key(self) -> str:
        """Name in files: `seg`, `seg-crop-216`, `seg-voc`, `sam-window-8`."""
        parts = [self.task, self.data_set]
        parts += [f"window-{self.window}"] if self.window is not None else []
        parts += [f"{name}-{value}" for name, value in self.options]
        return "-".join(part for part in parts if part)


def find_row(table: Sequence[PaperRow], model: str) -> PaperRow:
    """Return the paper's row of a model."""
    return next(row for row in table if row.model == model)


def runs_of(table: TableLayout, base: TrainConfig, num_seeds: int) -> dict[str, TrainConfig]:
    """Return the runs of a table by name, each in a folder of its own.

    With several seeds, a run's name ends in `-seedN`.
    """
    runs: dict[str, TrainConfig] = {}
    for name, config in table.make_runs(base).items():
        for number in range(num_seeds):
            seed = base.seed + number
            own = name if num_seeds == 1 else f"{name}-seed{seed}"
            runs[own] = replace(config, seed=seed, recipe=own, out=base.out / own)
    return runs


def without_seed(name: str) -> str:
    """Return a run's name without its `-seedN`, if it has one."""
    return name.rpartition("-seed")[0] or name


def seeds_of(runs: Runs, name: str) -> list[str]:
    """Return the names of the runs of a line's run, one per seed."""
    return [own for own in runs if name in (own, without_seed(own))]


def choose_runs(runs: Runs, names: tuple[str, ...]) -> dict[str, TrainConfig]:
    """Select runs by name, with or without `-seedN`; all for no names.

    Raises:
        ConfigError: there is no such run.
    """
    for name in names:
        if not seeds_of(runs, name):
            known = dict.fromkeys([*map(without_seed, runs), *runs])
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"no row {name!r}{hint}")
    chosen = {own for name in names for own in seeds_of(runs, name)}
    return {own: config for own, config in runs.items() if not names or own in chosen}


def nearest_side(student: str, base: TrainConfig) -> int:
    """Return the input side nearest to the base's resolution that a student takes."""
    options = resolve_options(student, StudentOptions())
    if options.has("image_size"):  # built for the resolution
        return base.resolution
    import torch  # imported late: `radio-train --help` need not wait for it

    from radio.model import make_student

    with torch.device("meta"):
        return make_student(student, options).nearest_size(base.resolution, base.resolution)[0]

"""What a run is set up from: teachers, the student's configuration, windows, and the checkpoint's card."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from evals.core.dist import Group
from evals.core.provenance import commit, versions
from radio.adaptors import AdaptorConfig
from radio.config import check_options, to_plain
from radio.errors import CheckpointError, ConfigError, SizeError, shown
from radio.hub import load_teacher
from radio.model import ModelConfig, RadioModel
from radio.students import students
from radio.types import Student, Teacher, Windowed

from .balancing import check_balance
from .config import TeacherConfig, TrainConfig
from .data.progress import LISTING
from .parallel import check_shardable, is_half
from .partition import Partition, make_partition
from .pictures import Described
from .teacher_weights import make_lean

# Settings that may change from one start to the next: what is told and kept, and who does the work.
_UNDECIDING = (
    *(
        "recipe",
        "out",
        "device",
        "log_every",
        "save_every",
        "keep_last",
        "keep_every",
        "max_skipped",
        "eval_every",
        "eval_tasks",
        "score",
    ),
    *("partition", "split", "engine", "accumulate", "compile", "teachers_ahead", "peak_tflops", "sinks"),
)


FOLDERS = ("state", "reports", "tensorboard")  # in a run folder
FILES = ("metrics.jsonl", "config.yaml", "ckpt.pt", "ckpt-ema.pt")


class TeacherFacts(NamedTuple):
    """What a run must know of a teacher that may live on other ranks."""

    fingerprint: str
    size: tuple[int, int]  # (height, width) in pixels that it sees
    summary_dim: int
    token_dim: int


def check_settings(config: TrainConfig, world: int) -> None:
    """None, when the settings make sense before anything is loaded.

    Raises:
        ConfigError: a setting out of bounds, a run folder that cannot be one, an unknown student, no weighted
            loss, or what `deal` refuses.
    """
    check_options(config)
    for name, (low, high) in {
        "--data.crop-scale": config.data.crop_scale,
        "--data.crop-aspect": config.data.crop_aspect,
    }.items():
        if low > high:
            raise ConfigError(f"{name} {low} {high}: the first is to be the lower one; swap them")
    for option, folder in {"--out": config.out, "--cache.folder": config.cache.folder}.items():
        if any("\ud800" <= char <= "\udfff" for char in str(folder)):
            raise ConfigError(f"{option} {shown(folder)}: is no UTF-8 text; choose another name")
    _check_folder(config.out)
    students[config.student]  # an unknown name raises here, with the nearest ones
    _check_weights(config)
    check_balance(config)
    if config.engine == "fsdp":
        facts = {t.name: TeacherFacts("", (1, 1), 1, 1) for t in config.teachers}
        described = model_config(config, facts)
        with torch.device("meta"):
            check_shardable(RadioModel(described).student)
    deal(config, world)


def _check_weights(config: TrainConfig) -> None:
    """None, when a loss has a weight: without any a run would learn nothing, and never say so."""
    spatial = config.loss.cosine or config.loss.smooth_l1
    if config.teachers and not any(
        t.summary_weight or (t.spatial_weight and spatial) for t in config.teachers
    ):
        raise ConfigError(
            "no loss of any teacher has a weight, and nothing would be learned; give a teacher a "
            "summary-weight above 0, or a spatial-weight beside --loss.cosine or --loss.smooth-l1"
        )


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is no folder; give another one")
    for name in FOLDERS:
        if (out / name).exists() and not (out / name).is_dir():
            raise ConfigError(f"{out / name}: is no folder, and the run needs one of that name; move it")
    for name in (*FILES, LISTING):
        if (out / name).is_dir():
            raise ConfigError(f"{out / name}: is a folder, and the run writes a file of that name; move it")


def deal(config: TrainConfig, world: int) -> Partition:
    """The run's groups of teachers and the ranks of each.

    Raises:
        ConfigError: the ranks cannot share the batches, or a rank's share has no `accumulate` equal parts.
    """
    partition = make_partition(config, world)
    for group in partition.groups:
        if group.share % config.accumulate:
            raise ConfigError(
                f"--accumulate {config.accumulate} does not divide the {group.share} pictures of a step that "
                f"a rank takes for {group.name}; give a number that does"
            )
    return partition


def check_memory(
    config: TrainConfig, model: ModelConfig, partition: Partition, rank: int, memory: int
) -> None:
    """None, when what a rank needs at least is less than the bytes that it can have.

    At least: weights, gradients and the optimizer's moments, and the images of a step.

    Raises:
        ConfigError: it is more; says how much of each.
    """
    with torch.device("meta"):
        weights = sum(weight.numel() * 4 for weight in RadioModel(model).parameters())
    held = weights * (4 + bool(config.ema)) // (partition.world if config.engine == "fsdp" else 1)
    images = sum(12 * group.side**2 * group.share for group in partition.of(rank))
    if held + images > memory:
        raise ConfigError(
            f"a rank needs {held / 1e9:,.1f} GB for the student's weights, gradients and moments and "
            f"{images / 1e9:,.1f} GB for the images of a step, and can have {memory / 1e9:,.1f} GB; give a "
            f"smaller --batch-size, --resolution, --adaptor.hidden or --student, or start more ranks"
        )


def load_teachers(
    config: TrainConfig, device: torch.device, names: Collection[str] | None = None
) -> dict[str, Teacher]:
    """The teachers of these names (all unless given) on their device, by name, in the config's order.

    Raises:
        ConfigError: no teachers, or two of one name.
        CheckpointError: a weights file that is not of its architecture, or not the one with its fingerprint.
    """
    known = [t.name for t in config.teachers]
    if half := next((name for name in known if any("\ud800" <= char <= "\udfff" for char in name)), None):
        raise ConfigError(f"a teacher cannot be named {half!r}, which is no UTF-8 text; choose another name")
    if not known or len(set(known)) != len(known):
        raise ConfigError(f"a run needs teachers with names of their own, got {', '.join(known) or 'none'}")
    chosen = [t for t in config.teachers if names is None or t.name in names]
    teachers = {t.name: _load_teacher(t) for t in chosen}
    for teacher in teachers.values():
        # On a CPU torch's own attention takes another way for weights in bfloat16, and rounds otherwise.
        make_lean(teacher, config, half=device.type == "cuda" and is_half(config, device))
        assert isinstance(teacher, nn.Module)
        teacher.to(device)  # and each weight keeps its type
    return teachers


def _load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher in float32, its fingerprint taken."""
    teacher = load_teacher(config.model).to(torch.device("cpu"), torch.float32)
    if config.fingerprint not in (None, teacher.fingerprint):
        raise CheckpointError(
            f"teacher {config.name}: {config.model} has other weights than asked for: their fingerprint is "
            f"{teacher.fingerprint}, not {config.fingerprint}; bring the right file, or mend the setting"
        )
    return teacher


def gather_facts(
    config: TrainConfig, teachers: Mapping[str, Teacher], group: Group
) -> dict[str, TeacherFacts]:
    """The facts of every teacher of the run, on whichever rank it lives, in the config's order.

    Raises:
        SizeError: a resolution that a teacher cannot take; names the nearest that it can.
    """
    sizes = teacher_sizes(config, teachers)
    mine = {
        name: TeacherFacts(teacher.fingerprint, sizes[name], teacher.summary_dim, teacher.token_dim)
        for name, teacher in teachers.items()
    }
    known: dict[str, TeacherFacts] = {}
    for facts in group.gather_objects(mine):
        known.update(facts)
    return {t.name: known[t.name] for t in config.teachers}


def teacher_sizes(config: TrainConfig, teachers: Mapping[str, Teacher]) -> dict[str, tuple[int, int]]:
    """The (height, width) that each of these teachers sees.

    Raises:
        SizeError: a resolution that the teacher cannot take; names the nearest that it can.
    """
    sizes = {}
    for t in config.teachers:
        if t.name in teachers:
            teacher = teachers[t.name]
            size = teacher.native_size if t.resolution is None else (t.resolution, t.resolution)
            _check(f"teacher {t.name}", size, teacher.fit(*size))
            sizes[t.name] = size
    return sizes


def student_resolutions(config: TrainConfig) -> dict[str, int]:
    """The student's input side in pixels beside each teacher."""
    return {t.name: t.student_resolution or config.resolution for t in config.teachers}


def fitted(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The run with a student that sees, beside each teacher, the size nearest to the setting that it takes.

    What was changed comes with it, a line each. The run's own resolution is not touched, nor a timm student,
    which is built for one size.
    """
    if config.student.startswith("timm:"):
        return config, []
    with torch.device("meta"):
        student = students[config.student](config.options)
    if isinstance(student, Windowed) and config.options.window is None:
        student = student.with_window(None)
    teachers, changes = [], []
    for teacher in config.teachers:
        if (asked := teacher.student_resolution) and (side := student.fit(asked, asked)[0]) != asked:
            changes.append(
                f"{config.student} cannot see {asked} px beside {teacher.name}; it sees {side}, the nearest "
                f"that it takes"
            )
            teacher = replace(teacher, student_resolution=side)
        teachers.append(teacher)
    return replace(config, teachers=tuple(teachers)), changes


def check_student(
    student: Student, resolutions: Mapping[str, int], windows: Mapping[int, tuple[int, ...]]
) -> None:
    """Nothing, when the student takes every resolution of the run.

    Raises:
        SizeError: it does not; names the nearest that it does.
    """
    for side in dict.fromkeys(resolutions.values()):
        taken = (
            student.with_window(windows[side][0])
            if windows[side] and isinstance(student, Windowed)
            else student
        )
        _check(f"student {student.name}", (side, side), taken.fit(side, side))


def model_config(config: TrainConfig, teachers: Mapping[str, TeacherFacts | Teacher]) -> ModelConfig:
    """The student and one adaptor per teacher.

    Raises:
        ConfigError: class tokens set twice, by `summary` and by `options.class_tokens`.
    """
    options = config.options
    if config.summary != "shared":
        if options.class_tokens is not None:
            raise ConfigError(
                f"--summary {config.summary} decides the class tokens; leave --options.class-tokens out"
            )
        options = replace(options, class_tokens=len(teachers) if config.summary == "per-teacher" else 0)
    if options.image_size is None and config.student.startswith("timm:"):  # some take the one size alone
        options = replace(options, image_size=config.resolution)
    adaptors = tuple(
        AdaptorConfig(
            name=name,
            summary_dim=teacher.summary_dim,
            token_dim=teacher.token_dim,
            hidden=config.adaptor.hidden,
            slot=index if config.summary == "per-teacher" else None,
            resample=config.adaptor.resample,
        )
        for index, (name, teacher) in enumerate(teachers.items())
    )
    return ModelConfig(student=config.student, options=options, adaptors=adaptors)


def window_candidates(
    model: RadioModel, config: TrainConfig, resolutions: Mapping[str, int]
) -> dict[int, tuple[int, ...]]:
    """The window sides to sample from at each resolution: those of the config that divide its grid.

    Empty where the student keeps its own: without windows, with one that follows the input's size or that
    the options fix, or where none fits.
    """
    sides = dict.fromkeys(resolutions.values())
    student = model.student
    if not isinstance(student, Windowed) or model.config.options.window is not None:
        return dict.fromkeys(sides, ())
    patch = student.with_window(None).fit(1, 1)[0]
    if student.fit(1, 1)[0] == patch:  # without windows, or chosen by the size of the input
        return dict.fromkeys(sides, ())
    return {
        side: tuple(w for w in config.windows if (side // patch) % w == 0 and w < side // patch)
        for side in sides
    }


def run_name(config: TrainConfig) -> str:
    """What the run is called: by its folder, be it given as `.` or `..`."""
    return config.out.resolve().name if config.out.name in ("", "..") else config.out.name


def make_card(config: TrainConfig, teachers: Mapping[str, TeacherFacts], data: Described) -> dict[str, Any]:
    """What the checkpoint says of its teachers, data and settings."""
    beside = student_resolutions(config)
    return {
        "name": run_name(config),
        "resolution": config.resolution,
        "teachers": [
            {
                "name": t.name,
                "model": t.model,
                "resolution": list(teachers[t.name].size),
                "student_resolution": beside[t.name],
                "fingerprint": teachers[t.name].fingerprint,
            }
            for t in config.teachers
        ],
        "data": {"fingerprint": data.fingerprint, "count": data.count, "sources": data.sources},
        "settings": to_plain(config),
    }


def deciding(config: TrainConfig, teachers: Mapping[str, TeacherFacts], data: Described) -> dict[str, Any]:
    """Everything that decides the weights, by name, so that no other run takes up this one's state."""
    plain: dict[str, Any] = to_plain(config)
    for name in _UNDECIDING:
        plain.pop(name)
    for name in ("workers", "max_broken", "shards", "images"):  # a run may move with its data
        plain["data"].pop(name)
    plain["cache"].pop("confirm")
    for teacher in plain["teachers"]:
        teacher.pop("fingerprint")  # what it is stands below, wanted or not
    for name, facts in teachers.items():
        plain[f"teacher {name}'s weights"] = facts.fingerprint
    return {**plain, "pictures": data.fingerprint}


def provenance(step: int, samples: int) -> dict[str, Any]:
    """Where a checkpoint came from: versions, commit, steps and pictures seen."""
    return {"versions": versions(), "commit": commit(), "step": step, "samples": samples}


def _check(who: str, wanted: tuple[int, int], nearest: tuple[int, int]) -> None:
    if wanted != nearest:
        raise SizeError(
            f"{who} cannot take {wanted[0]}x{wanted[1]} px; "
            f"the nearest size that it can is {nearest[0]}x{nearest[1]}"
        )

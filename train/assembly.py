"""Set up a run: its teachers, the student's configuration, windows, and the checkpoint's metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from radio.adaptors import AdaptorConfig
from radio.config import check_options, to_plain
from radio.dist import Group
from radio.errors import CheckpointError, ConfigError, SizeError, shown
from radio.hub import load_teacher
from radio.model import ModelConfig, RadioModel, make_student
from radio.provenance import commit, versions
from radio.students import students
from radio.types import Student, Teacher

from .balancing import check_balance
from .config import TeacherConfig, TrainConfig, run_name
from .data.progress import LISTING
from .images import DatasetInfo
from .parallel import check_shardable, is_half
from .partition import Partition, make_partition
from .teacher_weights import make_lean

# Settings that a resumed run may change: logging, saving, and how the work is distributed.
RESUME_IGNORED = (
    *(
        "recipe",
        "out",
        "device",
        "log_every",
        "save_every",
        "keep_last",
        "keep_every",
        "max_nonfinite_steps",
        "eval_every",
        "eval_tasks",
        "score",
    ),
    *(
        "teacher_placement",
        "ranks_per_group",
        "parallel",
        "grad_accum_steps",
        "compile",
        "prefetch_teachers",
        "peak_tflops",
        "loggers",
    ),
)


FOLDERS = ("state", "reports", "tensorboard")  # in a run folder
FILES = ("metrics.jsonl", "config.yaml", "ckpt.pt", "ckpt-ema.pt")


class TeacherFacts(NamedTuple):
    """What a run needs to know about a teacher that may live on another rank."""

    fingerprint: str
    size: tuple[int, int]  # (height, width) of its input in pixels
    summary_dim: int
    token_dim: int


def check_settings(config: TrainConfig, world: int) -> None:
    """Check that the settings are consistent, before anything is loaded.

    Raises:
        ConfigError: a setting is out of bounds, the run folder is unusable, the student is unknown, no loss
            has a weight, or `partition_ranks` fails.
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
    if config.parallel == "fsdp":
        facts = {t.name: TeacherFacts("", (1, 1), 1, 1) for t in config.teachers}
        described = model_config(config, facts)
        with torch.device("meta"):
            check_shardable(RadioModel(described).student)
    partition_ranks(config, world)


def _check_weights(config: TrainConfig) -> None:
    """Check that some loss has a weight: without one a run would silently learn nothing."""
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


def partition_ranks(config: TrainConfig, world: int) -> Partition:
    """Assign ranks to the run's groups of teachers.

    Raises:
        ConfigError: the ranks cannot share the batches, or `grad_accum_steps` does not divide a rank's share.
    """
    partition = make_partition(config, world)
    for group in partition.groups:
        if group.share % config.grad_accum_steps:
            raise ConfigError(
                f"--grad-accum-steps {config.grad_accum_steps} does not divide the {group.share} images of a "
                f"step that a rank takes for {group.name}; give a number that does"
            )
    return partition


def check_memory(
    config: TrainConfig, model: ModelConfig, partition: Partition, rank: int, memory: int
) -> None:
    """Check that the least memory a rank needs fits the bytes it has.

    Counted are weights, gradients, the optimizer's moments, and the images of a step.

    Raises:
        ConfigError: it does not fit; the message gives each amount.
    """
    with torch.device("meta"):
        weights = sum(weight.numel() * 4 for weight in RadioModel(model).parameters())
    held = weights * (4 + bool(config.ema)) // (partition.world if config.parallel == "fsdp" else 1)
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
    """Load the named teachers (default: all) onto the device; return them by name in the config's order.

    Raises:
        ConfigError: there are no teachers, or two have the same name.
        CheckpointError: a weights file does not match the architecture or the configured fingerprint.
    """
    known = [t.name for t in config.teachers]
    if half := next((name for name in known if any("\ud800" <= char <= "\udfff" for char in name)), None):
        raise ConfigError(f"a teacher cannot be named {half!r}, which is no UTF-8 text; choose another name")
    if not known or len(set(known)) != len(known):
        raise ConfigError(f"a run needs teachers with names of their own, got {', '.join(known) or 'none'}")
    chosen = [t for t in config.teachers if names is None or t.name in names]
    teachers = {t.name: _load_teacher(t) for t in chosen}
    for teacher in teachers.values():
        # On a CPU torch's attention uses another kernel for bfloat16 weights, which rounds differently.
        make_lean(teacher, config, half=device.type == "cuda" and is_half(config, device))
        assert isinstance(teacher, nn.Module)
        teacher.to(device)  # each weight keeps its dtype
    return teachers


def _load_teacher(config: TeacherConfig) -> Teacher:
    """Load a teacher in float32 on the CPU and verify its fingerprint."""
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
    """Gather the facts of every teacher of the run from all ranks, in the config's order.

    Raises:
        SizeError: a teacher cannot take its resolution; the message names the nearest valid one.
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
    """Return the input size (height, width) of each of these teachers.

    Raises:
        SizeError: a teacher cannot take its resolution; the message names the nearest valid one.
    """
    sizes = {}
    for t in config.teachers:
        if t.name in teachers:
            teacher = teachers[t.name]
            size = teacher.native_size if t.resolution is None else (t.resolution, t.resolution)
            _check(f"teacher {t.name}", size, teacher.nearest_size(*size))
            sizes[t.name] = size
    return sizes


def student_resolutions(config: TrainConfig) -> dict[str, int]:
    """Return the student's input side in pixels for each teacher."""
    return {t.name: t.student_resolution or config.resolution for t in config.teachers}


def round_resolutions(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Round the student's resolution for each teacher to the nearest one that the student takes.

    Returns the config and one line per change. The run's own resolution is not changed, nor that of a timm
    student, which is built for one size.
    """
    if config.student.startswith("timm:"):
        return config, []
    with torch.device("meta"):
        student = make_student(config.student, config.options)
    if student.with_window is not None and config.options.window is None:
        student = student.with_window(None)
    teachers, changes = [], []
    for teacher in config.teachers:
        if (asked := teacher.student_resolution) and (side := student.nearest_size(asked, asked)[0]) != asked:
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
    """Check that the student takes every resolution of the run.

    Raises:
        SizeError: it does not; the message names the nearest valid one.
    """
    for side in dict.fromkeys(resolutions.values()):
        taken = (
            student.with_window(windows[side][0])
            if windows[side] and student.with_window is not None
            else student
        )
        _check(f"student {student.name}", (side, side), taken.nearest_size(side, side))


def model_config(config: TrainConfig, teachers: Mapping[str, TeacherFacts | Teacher]) -> ModelConfig:
    """Build the model's config: the student and one adaptor per teacher.

    Raises:
        ConfigError: class tokens are set twice, by `summary` and by `options.class_tokens`.
    """
    options = config.options
    if config.summary != "shared":
        if options.class_tokens is not None:
            raise ConfigError(
                f"--summary {config.summary} decides the class tokens; leave --options.class-tokens out"
            )
        options = replace(options, class_tokens=len(teachers) if config.summary == "per-teacher" else 0)
    if options.image_size is None and config.student.startswith("timm:"):  # some take one size only
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
    """Return the window sides to sample from at each resolution: those of the config that divide its grid.

    Empty where none fits or the student decides itself: it has no windows, its window follows the input's
    size, or the options fix it.
    """
    sides = dict.fromkeys(resolutions.values())
    student = model.student
    if student.window is None or model.config.options.window is not None:
        return dict.fromkeys(sides, ())
    patch = student.patch_size
    return {
        side: tuple(w for w in config.windows if (side // patch) % w == 0 and w < side // patch)
        for side in sides
    }


def make_metadata(
    config: TrainConfig, teachers: Mapping[str, TeacherFacts], data: DatasetInfo
) -> dict[str, Any]:
    """Build the checkpoint's metadata: teachers, data and settings."""
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


def resume_signature(
    config: TrainConfig, teachers: Mapping[str, TeacherFacts], data: DatasetInfo
) -> dict[str, Any]:
    """Collect all that affects the weights, by name; only a run with an equal signature may resume."""
    plain: dict[str, Any] = to_plain(config)
    for name in RESUME_IGNORED:
        plain.pop(name)
    for name in ("workers", "max_error_fraction", "shards", "images"):  # the data may move to other paths
        plain["data"].pop(name)
    plain["cache"].pop("confirm")
    for teacher in plain["teachers"]:
        teacher.pop("fingerprint")  # the actual one is added below
    for name, facts in teachers.items():
        plain[f"teacher {name}'s weights"] = facts.fingerprint
    return {**plain, "images": data.fingerprint}


def provenance(step: int, samples: int) -> dict[str, Any]:
    """Build a checkpoint's provenance: versions, commit, steps and images seen."""
    return {"versions": versions(), "commit": commit(), "step": step, "samples": samples}


def _check(who: str, wanted: tuple[int, int], nearest: tuple[int, int]) -> None:
    if wanted != nearest:
        raise SizeError(
            f"{who} cannot take {wanted[0]}x{wanted[1]} px; "
            f"the nearest size that it can is {nearest[0]}x{nearest[1]}"
        )

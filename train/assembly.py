"""What a run is set up from: teachers, the student's configuration, windows, and the checkpoint's card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from evals.core.provenance import commit, versions
from radio.adaptors import AdaptorConfig
from radio.config import to_plain
from radio.errors import ConfigError, SizeError
from radio.hub import load_teacher
from radio.model import ModelConfig, RadioModel
from radio.students import students
from radio.types import Student, Teacher, Windowed

from .config import TrainConfig
from .crops import Pictures


def check_settings(config: TrainConfig, world: int) -> None:
    """None, when the settings make sense before anything is loaded.

    Raises:
        ConfigError: a count below 1, an unknown student, or a batch that the ranks cannot share evenly.
    """
    counts = {
        "--steps": config.steps,
        "--batch-size": config.batch_size,
        "--resolution": config.resolution,
        "--log-every": config.log_every,
        "--save-every": config.save_every,
        "--cache.crops": config.cache.crops,
        "--cache.pictures": 1 if config.cache.pictures is None else config.cache.pictures,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} {count} cannot be; give 1 or more")
    students[config.student]  # an unknown name raises here, with the nearest ones
    if config.batch_size % world:
        raise ConfigError(f"a batch of {config.batch_size} cannot be shared evenly by {world} ranks")
    for t in config.teachers:
        if t.every < 1 or (config.batch_size // world) % t.every:
            raise ConfigError(
                f"teacher {t.name} cannot see one in {t.every} of the {config.batch_size // world} pictures "
                f"of a rank's batch; give it an `every` that divides them"
            )


def load_teachers(config: TrainConfig, device: torch.device) -> dict[str, Teacher]:
    """Every teacher of a run on its device, by adaptor name.

    Raises:
        ConfigError: no teachers, or two of one name.
    """
    names = [t.name for t in config.teachers]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"a run needs teachers with names of their own, got {', '.join(names) or 'none'}")
    return {t.name: load_teacher(t.model).to(device, torch.float32) for t in config.teachers}


def teacher_sizes(config: TrainConfig, teachers: Mapping[str, Teacher]) -> dict[str, tuple[int, int]]:
    """The (height, width) that each teacher sees.

    Raises:
        SizeError: a resolution that the teacher cannot take; names the nearest that it can.
    """
    sizes = {}
    for t in config.teachers:
        teacher = teachers[t.name]
        size = teacher.native_size if t.resolution is None else (t.resolution, t.resolution)
        _check(f"teacher {t.name}", size, teacher.fit(*size))
        sizes[t.name] = size
    return sizes


def student_resolutions(config: TrainConfig) -> dict[str, int]:
    """The student's input side in pixels beside each teacher."""
    return {t.name: t.student_resolution or config.resolution for t in config.teachers}


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


def model_config(config: TrainConfig, teachers: Mapping[str, Teacher]) -> ModelConfig:
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


def make_card(
    config: TrainConfig,
    teachers: Mapping[str, Teacher],
    sizes: Mapping[str, tuple[int, int]],
    pictures: Pictures,
) -> dict[str, Any]:
    """What the checkpoint says of its teachers, data and settings."""
    beside = student_resolutions(config)
    return {
        "name": config.out.name,
        "resolution": config.resolution,
        "teachers": [
            {
                "name": t.name,
                "model": t.model,
                "resolution": list(sizes[t.name]),
                "student_resolution": beside[t.name],
                "fingerprint": teachers[t.name].fingerprint,
            }
            for t in config.teachers
        ],
        "data": {"fingerprint": pictures.fingerprint, "count": len(pictures), "sources": pictures.sources},
        "settings": to_plain(config),
    }


def provenance(step: int, config: TrainConfig) -> dict[str, Any]:
    """Where a checkpoint came from: versions, commit, steps and pictures seen."""
    return {"versions": versions(), "commit": commit(), "step": step, "samples": step * config.batch_size}


def _check(who: str, wanted: tuple[int, int], nearest: tuple[int, int]) -> None:
    if wanted != nearest:
        raise SizeError(
            f"{who} cannot take {wanted[0]}x{wanted[1]} px; "
            f"the nearest size that it can is {nearest[0]}x{nearest[1]}"
        )

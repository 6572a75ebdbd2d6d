"""Several students under the same settings, as in the paper's table 6: the runs that stand for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from evals.core.paper import TABLE_6_MODELS
from radio.students import students

from .config import TrainConfig

ALL = "all"
"""The student that stands for every one of `STUDENTS`."""

STUDENTS: tuple[str, ...] = tuple(
    name
    for name in TABLE_6_MODELS
    if not name.startswith(("dinov2:", "openclip:")) and name not in ("vit-l14", "vit-h14")
)
"""The paper's table 6 without its two large ViTs, which take hours on a CPU even in small."""

_PLACE = "{student}"


def compares(config: TrainConfig) -> bool:
    """Whether the settings are for students side by side: each gets a folder with its name."""
    return _PLACE in str(config.out)


def runs_of(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """The runs that the settings stand for: one, or where students are compared, one for each.

    There, a student is trained at the size nearest to the resolution that it takes.

    Raises:
        ConfigError: an unknown student.
    """
    if not compares(config):
        return (config,)
    names = STUDENTS if config.student == ALL else (config.student,)
    return tuple(_run_of(config, name) for name in names)


def _run_of(config: TrainConfig, name: str) -> TrainConfig:
    out = Path(str(config.out).replace(_PLACE, name.replace(":", "-")))
    return replace(config, student=name, out=out, resolution=_side(name, config))


def _side(name: str, config: TrainConfig) -> int:
    """The side in pixels nearest to the run's resolution that the student takes."""
    factory = students[name]
    if name.startswith("timm:"):  # built for the resolution
        return config.resolution
    with torch.device("meta"):
        return factory(config.options).fit(config.resolution, config.resolution)[0]

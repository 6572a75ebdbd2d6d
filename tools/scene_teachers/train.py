"""Train the scenes teachers that the package contains: `python -m tools.scene_teachers.train --out FOLDER`.

With a fixed seed and one thread the same machine gives the same files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from annotated_types import Interval
from rich.console import Console
from torch import Tensor, nn

from radio.checkpoint import load, load_state, save
from radio.config import Count, Seed, check_options, parse_options, to_plain
from radio.errors import ConfigError, RadioError, did_you_mean
from radio.model import seeded
from radio.teachers.scenes import (
    NAMES,
    Clip,
    Name,
    frozen_clip,
    frozen_dense,
    new_dense,
    new_sam,
    weights_file,
)
from train.config import BatchSize, OptimConfig, Rate
from train.loggers import say
from train.monitor import first_bad
from train.optim import learning_rate, make_optimizer

from .losses import ClipLoss, DenseLoss, Loss, SamLoss, scene_batches
from .scores import FULL, QUICK, Protocol, Scores, box_miou, score

COMMAND: Final = "python -m tools.scene_teachers.train"
_FIRST: dict[Name, int] = {
    # The first scene of each: no scene is used twice. In the order of training: CLIP's trunk starts from the
    # dense one's.
    "dense": 0,
    "clip": 1_000_000,
    "sam": 2_000_000,
}
_SCENES_SEED = 1  # the scores are measured on scenes of seed 0
_LOG_EVERY = 50
_OPTIM = OptimConfig(weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One teacher's training: number of samples, batch size and learning rate."""

    samples: Count
    batch: BatchSize
    lr: Rate


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachersConfig:
    """Which teachers to train, the output folder, and each one's training."""

    out: Path = Path("runs/scenes-teachers")
    only: tuple[str, ...] = NAMES
    seed: Seed = 0  # of initial weights, mirroring and prompts
    threads: Annotated[int, Interval(ge=1, le=1024)] = 1
    dense: Schedule = Schedule(samples=64_000, batch=32, lr=1.5e-3)
    clip: Schedule = Schedule(samples=12_000, batch=32, lr=1e-3)
    sam: Schedule = Schedule(samples=32_000, batch=32, lr=1e-3)

    @property
    def schedules(self) -> dict[Name, Schedule]:
        """The schedules by the teachers' names."""
        return {"dense": self.dense, "clip": self.clip, "sam": self.sam}


def train_teachers(settings: TeachersConfig, console: Console) -> list[Path]:
    """Train the selected teachers, write their files and return the paths.

    Raises:
        ConfigError: no teacher is named, one is unknown, or there are fewer samples than one batch.
        CheckpointError: CLIP is selected without dense, and `out` holds no dense teacher to start from.
    """
    check_options(settings)
    if not settings.only:
        raise ConfigError(f"--only names no teacher; leave it out, or give some of {', '.join(NAMES)}")
    for name in settings.only:
        if name not in NAMES:
            raise ConfigError(
                f"unknown scenes teacher {name!r}{did_you_mean(name, NAMES)}; known: {', '.join(NAMES)}"
            )
    selected = {name: each for name, each in settings.schedules.items() if name in settings.only}
    for name, schedule in selected.items():
        if schedule.samples < schedule.batch:
            raise ConfigError(
                f"{schedule.samples} samples for scenes:{name} are less than one batch of {schedule.batch}; "
                f"give more"
            )
    settings.out.mkdir(parents=True, exist_ok=True)  # fails now, not after hours
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return [_make(name, schedule, settings, console) for name, schedule in selected.items()]
    finally:
        torch.set_num_threads(before)


def measure(name: Name, module: Any, protocol: Protocol) -> Scores:
    """Measure the scores of one trained scenes teacher, in percent, to a hundredth."""
    if name == "sam":
        scores = box_miou(module, protocol.sam_scenes)
    else:
        scores = score(frozen_clip(module) if name == "clip" else frozen_dense(module), protocol)
    return {key: round(value, 2) for key, value in scores.items()}


def _make(name: Name, schedule: Schedule, settings: TeachersConfig, console: Console) -> Path:
    started = time.monotonic()
    with seeded(settings.seed):  # initial weights only
        loss, teacher = _BUILDERS[name](settings)
    curve = _train(loss, name, schedule, settings.seed, console)
    minutes = (time.monotonic() - started) / 60
    tensors = {
        key: value.half() if value.is_floating_point() else value
        for key, value in teacher.state_dict().items()
    }
    if bad := first_bad(tensors):
        raise RadioError(
            f"scenes:{name}: {bad} is not finite; nothing is written. Give a lower learning rate"
        )
    load_state(teacher, {key: value.float() for key, value in tensors.items()}, name)  # score what is shipped
    teacher.requires_grad_(False).eval()
    scores = {"full": measure(name, teacher, FULL), "quick": measure(name, teacher, QUICK)}
    metadata = {
        "name": f"scenes:{name}",
        "command": COMMAND,
        "settings": {
            "seed": settings.seed,
            "threads": settings.threads,
            "schedule": to_plain(schedule),
            "optim": to_plain(replace(_OPTIM, lr=schedule.lr)),
        },
        "samples": schedule.samples // schedule.batch * schedule.batch,
        "scenes": f"split train, seed {_SCENES_SEED}, from index {_FIRST[name]}",
        "minutes": round(minutes, 1),
        "versions": {
            package: version(package) for package in ("torch", "numpy", "open_clip_torch", "segment_anything")
        },
        "protocols": {"full": to_plain(FULL), "quick": to_plain(QUICK)},
        "curve": [*curve[: -1 : max(1, len(curve) // 20)], curve[-1]],
        "scores": scores,
    }
    path = weights_file(name, settings.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, tensors, metadata)
    say(console, f"{path}: {scores}")
    return path


def _dense(settings: TeachersConfig) -> tuple[nn.Module, nn.Module]:
    vit = new_dense()
    return DenseLoss(vit), vit


def _clip(settings: TeachersConfig) -> tuple[nn.Module, nn.Module]:
    """Build both towers; the image tower starts from the dense teacher in the same folder."""
    clip = Clip()
    dense = load(weights_file("dense", settings.out)).tensors
    load_state(clip.image.vit, {key: value.float() for key, value in dense.items()}, "scenes:dense")
    return ClipLoss(clip), clip


def _sam(settings: TeachersConfig) -> tuple[nn.Module, nn.Module]:
    sam = new_sam()
    return SamLoss(sam, torch.Generator().manual_seed(settings.seed + 1)), sam


_BUILDERS: dict[Name, Callable[[TeachersConfig], tuple[nn.Module, nn.Module]]] = {
    "dense": _dense,
    "clip": _clip,
    "sam": _sam,
}


def _train(
    module: nn.Module, name: Name, schedule: Schedule, seed: int, console: Console
) -> list[dict[str, float]]:
    """Train in place; return the means of loss and accuracies of every 50 steps."""
    steps = schedule.samples // schedule.batch
    optim = replace(_OPTIM, lr=schedule.lr)
    optimizer = make_optimizer(module, optim)
    mirrored = torch.Generator().manual_seed(seed)
    curve: list[dict[str, float]] = []
    recent: list[dict[str, Tensor]] = []
    batches = scene_batches(_FIRST[name], schedule.samples, schedule.batch, _SCENES_SEED, mirrored)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, optim)
        loss: Loss = module(batch, step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
        optimizer.step()
        recent.append({"loss": loss.total.detach(), **loss.accuracies})
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
            means = {
                key: round(float(torch.stack([figures[key] for figures in recent]).mean()), 4)
                for key in recent[0]
            }
            curve.append({"samples": (step + 1) * schedule.batch, **means})
            say(console, f"scenes:{name} {curve[-1]}")
            recent = []
    return curve


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 an error, in one line."""
    console = Console()
    try:
        settings = parse_options(
            TeachersConfig, sys.argv[1:] if argv is None else argv, default=TeachersConfig(), prog=COMMAND
        )
        train_teachers(settings, console)
    except RadioError as error:
        say(Console(stderr=True), f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

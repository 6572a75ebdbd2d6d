"""Training of the shipped tiny scenes teachers by one command, with a fixed seed and one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from annotated_types import Interval
from rich.console import Console
from torch import Tensor, nn

from radio.checkpoint import Checkpoint, load, load_state, save
from radio.config import Count, Seed, check_options, to_plain
from radio.errors import ConfigError, RadioError, did_you_mean
from radio.model import seeded
from radio.teachers.scenes import NAMES, Clip, Name, frozen_clip, frozen_dense, new_dense, weights_file
from radio.teachers.scenes_sam import new_sam

from .config import BatchSize, OptimConfig, Rate
from .loggers import say
from .monitor import first_bad
from .optim import learning_rate, make_optimizer
from .scenes_lessons import ClipLesson, DenseLesson, Loss, SamLesson, SceneBatch, lessons
from .scenes_scores import FULL, QUICK, Protocol, Scores, box_miou, score

COMMAND: Final = "radio-train scenes-teachers"
_ORDER: tuple[Name, ...] = ("dense", "clip", "sam")  # CLIP's trunk starts from the dense one's
_FIRST: dict[Name, int] = {
    "dense": 0,
    "clip": 1_000_000,
    "sam": 2_000_000,
}  # index of the first scene: no scene is used twice
_SEED_OF_SCENES = 1  # the scores are measured on scenes of seed 0
_LOG_EVERY = 50
_OPTIM = OptimConfig(weight_decay=0.05, betas=(0.9, 0.98), warmup=0.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
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
    dense: Course = Course(samples=64_000, batch=32, lr=1.5e-3)
    clip: Course = Course(samples=12_000, batch=32, lr=1e-3)
    sam: Course = Course(samples=32_000, batch=32, lr=1e-3)


def main(settings: TeachersConfig, console: Console | None = None) -> list[Path]:
    """Train the selected teachers, write their files and return the paths; report to the console.

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
    for name in settings.only:
        course = _course(name, settings)
        if course.samples < course.batch:
            raise ConfigError(
                f"{course.samples} samples for scenes:{name} are less than one batch of {course.batch}; "
                f"give more"
            )
    settings.out.mkdir(parents=True, exist_ok=True)  # fails now, not after hours
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        shown = console or Console()
        return [_make(name, settings, shown) for name in _ORDER if name in settings.only]
    finally:
        torch.set_num_threads(before)


def _course(name: str, settings: TeachersConfig) -> Course:
    return {"dense": settings.dense, "clip": settings.clip, "sam": settings.sam}[name]


def _make(name: Name, settings: TeachersConfig, console: Console) -> Path:
    course = _course(name, settings)
    started = time.monotonic()
    with seeded(settings.seed):  # initial weights only
        lesson, product = _MAKERS[name](settings)
    curve = _teach(lesson, name, course, settings.seed, console)
    minutes = (time.monotonic() - started) / 60
    tensors = {
        key: value.half() if value.is_floating_point() else value
        for key, value in product.state_dict().items()
    }
    if bad := first_bad(tensors):
        raise RadioError(
            f"scenes:{name}: {bad} is not finite; nothing is written. Give a lower learning rate"
        )
    load_state(product, {key: value.float() for key, value in tensors.items()}, name)  # score what is shipped
    product.requires_grad_(False).eval()
    metadata = _metadata(name, course, settings, minutes, curve)
    metadata["scores"] = {"full": measure(name, product, FULL), "quick": measure(name, product, QUICK)}
    path = weights_file(name, settings.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, tensors, metadata)
    say(console, f"{path}: {metadata['scores']}")
    return path


def measure(name: Name, module: Any, protocol: Protocol) -> Scores:
    """Measure the scores of one trained scenes teacher, in percent, to a hundredth."""
    if name == "sam":
        scores = box_miou(module, protocol.sam_scenes)
    else:
        scores = score(frozen_clip(module) if name == "clip" else frozen_dense(module), protocol)
    return {key: round(value, 2) for key, value in scores.items()}


def _dense(settings: TeachersConfig) -> tuple[nn.Module, nn.Module]:
    vit = new_dense()
    return DenseLesson(vit), vit


def _clip(settings: TeachersConfig) -> tuple[nn.Module, nn.Module]:
    """Build both towers; the image tower starts from the dense teacher in the same folder."""
    clip = Clip()
    dense: Checkpoint = load(weights_file("dense", settings.out))
    load_state(clip.image.vit, {key: value.float() for key, value in dense.tensors.items()}, "scenes:dense")
    return ClipLesson(clip), clip


def _sam(settings: TeachersConfig) -> tuple[nn.Module, nn.Module]:
    sam = new_sam()
    return SamLesson(sam, torch.Generator().manual_seed(settings.seed + 1)), sam


_MAKERS: dict[Name, Callable[[TeachersConfig], tuple[nn.Module, nn.Module]]] = {
    "dense": _dense,
    "clip": _clip,
    "sam": _sam,
}


def _teach(
    module: nn.Module, name: Name, course: Course, seed: int, console: Console
) -> list[dict[str, float]]:
    """Train in place; return the means of loss and accuracies of every 50 steps."""
    steps = course.samples // course.batch
    optim = replace(_OPTIM, lr=course.lr)
    optimizer = make_optimizer(module, optim)
    mirrors = torch.Generator().manual_seed(seed)
    curve: list[dict[str, float]] = []
    seen: list[Loss] = []
    stream = lessons(_FIRST[name], course.samples, course.batch, _SEED_OF_SCENES, mirrors)
    for step, lesson in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, optim)
        seen.append(_step(module, lesson, step / steps, optimizer, optim.clip))
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
            curve.append({"samples": (step + 1) * course.batch, **_means(seen)})
            say(console, f"scenes:{name} {curve[-1]}")
            seen = []
    return curve


def _step(
    module: nn.Module, lesson: SceneBatch, progress: float, optimizer: torch.optim.Optimizer, clip: float
) -> Loss:
    loss: Loss = module(lesson, progress)
    optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return Loss(loss.total.detach(), loss.watched)


def _means(seen: list[Loss]) -> dict[str, float]:
    def mean(values: list[Tensor]) -> float:
        return round(float(torch.stack(values).mean()), 4)

    keys = seen[0].watched
    return {"loss": mean([loss.total for loss in seen])} | {
        key: mean([loss.watched[key] for loss in seen]) for key in keys
    }


def _metadata(
    name: Name, course: Course, settings: TeachersConfig, minutes: float, curve: list[dict[str, float]]
) -> dict[str, Any]:
    return {
        "name": f"scenes:{name}",
        "command": COMMAND,
        "settings": {
            "seed": settings.seed,
            "threads": settings.threads,
            "course": to_plain(course),
            "optim": to_plain(replace(_OPTIM, lr=course.lr)),
        },
        "samples": course.samples // course.batch * course.batch,
        "scenes": f"split train, seed {_SEED_OF_SCENES}, from index {_FIRST[name]}",
        "minutes": round(minutes, 1),
        "versions": {
            package: version(package) for package in ("torch", "numpy", "open_clip_torch", "segment_anything")
        },
        "protocols": {"full": to_plain(FULL), "quick": to_plain(QUICK)},
        "curve": [*curve[: -1 : max(1, len(curve) // 20)], curve[-1]],
    }

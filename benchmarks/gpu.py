"""Measure images/s, MFU and memory of one rank's step of the paper's recipes: random weights, random images.

For each teacher group of a recipe, one rank's work is done as in a run (teachers prefetched on a separate
stream, the student's forward and backward, the optimiser), without communication between ranks. Nothing is
read or written: no weights, no data, no network. FLOPs and planned memory are those of `--plan`.

    python benchmarks/gpu.py [--recipes paper-b14 paper-h14] [--steps 20] [--batch 32] [--compile]
    python benchmarks/gpu.py --device cpu --tiny    # the same code with tiny models, without a GPU
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn

from radio.dist import Ranks
from radio.errors import ConfigError, RadioError
from radio.hub import load_teacher
from radio.types import Teacher
from train.config import DataConfig, PlanOptions, TrainConfig
from train.data.loader import Batch, GroupBatch, for_student, prefetch, to_images
from train.distributed import is_half
from train.groups import TeacherGroup, make_partition
from train.plan import PAPERS_RANKS, make_plan
from train.recipes import recipes
from train.setup import make_lean
from train.trainer import Trainer

PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # TFLOP/s in bfloat16, dense, from the vendor
COLUMNS = ("recipe", "teachers", "images", "px", "s/step", "images/s", "TFLOP/s", "MFU", "GB", "GB planned")
WARMUP = 3  # steps that are not timed


class Measured(NamedTuple):
    """Measurements of one rank's steps in one teacher group."""

    images: int  # per step
    seconds: float  # per step
    flops: int  # per step
    peak: float | None  # peak bytes; None on a CPU
    planned: int  # bytes, from `--plan`


def main() -> int:
    """Print the table of all recipes and groups; return 0."""
    options = _parse()
    device = _device(options.device)
    config = [_settings(name, options, device) for name in options.recipes]
    lines = [COLUMNS, tuple("-" * len(name) for name in COLUMNS)]
    for recipe in config:
        for group in make_partition(recipe, 1 if options.tiny else PAPERS_RANKS).groups:
            share = group.share if options.batch is None else options.batch
            found = measure(one_rank(recipe, group, share), device, options.steps)
            lines.append(_row(recipe.recipe, group, found, _peak(options.peak_tflops, device)))
    sys.stdout.write(f"{_name(device)}, torch {torch.__version__}\n\n")
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return 0


def one_rank(config: TrainConfig, group: TeacherGroup, share: int) -> TrainConfig:
    """Return the config of a one-process run whose step equals that of one rank of the group."""
    teachers = tuple(replace(t, batch_size=None) for t in config.teachers if t.name in group.teachers)
    return replace(
        config, teachers=teachers, batch_size=share, ranks_per_group=(), teacher_placement="shared"
    )


def measure(config: TrainConfig, device: torch.device, steps: int) -> Measured:
    """Time the steps of one group's run on this device."""
    on_gpu = device.type == "cuda"
    plan = make_plan(config, PlanOptions(world=1))
    partition = plan.partition
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    teachers = {t.name: random_teacher(t.model, config, device) for t in config.teachers}
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(config, out=Path(folder) / "run", data=DataConfig(scenes=1))
        run = Trainer(settings, Ranks(), device, Console(quiet=True), teachers=teachers)
    start = time.perf_counter()
    for step, batch in enumerate(prefetch(_batches(run, WARMUP + steps), device)):
        if step == WARMUP:
            start = _now(device)
        run.train_step(batch)
        run.step += 1
    seconds = (_now(device) - start) / steps
    peak = float(torch.cuda.max_memory_allocated(device)) if on_gpu else None
    return Measured(partition.batch_size, seconds, plan.flops, peak, plan.kinds[0].memory.peak)


def random_teacher(spec: str, config: TrainConfig, device: torch.device) -> Teacher:
    """Build a teacher with small random weights on the device, in the precision that a run uses."""
    teacher = load_teacher(spec, meta=True)
    make_lean(teacher, config, half=is_half(config, device) and device.type == "cuda")
    assert isinstance(teacher, nn.Module)
    teacher.to_empty(device=device)
    for weight in teacher.parameters():
        weight.data.normal_(std=0.02)
    for buffer in teacher.buffers():  # mean, std, statistics; indices become 0
        buffer.fill_(1.0 if buffer.is_floating_point() else 0)
    return teacher


def _batches(run: Trainer, steps: int) -> Iterator[Batch]:
    """Yield the same random images with the teachers' features, as the loader does."""
    (group,), (sides,) = run.groups, run.sides
    pixels = {
        side: torch.randint(256, (group.share, 3, crop, crop), dtype=torch.uint8)
        for side, crop in sides.items()
    }
    if run.device.type == "cuda":
        pixels = {side: each.pin_memory() for side, each in pixels.items()}
    for step in range(steps):
        side = group.side_at(run.config.seed, step)
        images = to_images(pixels[side], run.device)
        batch = GroupBatch(group, for_student(images, side), run.run_teachers(step, group, images))
        yield Batch((batch,), 0.0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(recipe: str, group: TeacherGroup, found: Measured, peak: float | None) -> tuple[str, ...]:
    speed = found.flops / found.seconds / 1e12
    return (
        recipe,
        group.name,
        str(found.images),
        "/".join(map(str, group.sides)),
        f"{found.seconds:.4g}",
        f"{found.images / found.seconds:.4g}",
        f"{speed:.4g}",
        "-" if peak is None else f"{speed / peak:.1%}",
        "-" if found.peak is None else f"{found.peak / 1e9:.3g}",
        f"{found.planned / 1e9:.3g}",
    )


def _settings(name: str, options: argparse.Namespace, device: torch.device) -> TrainConfig:
    config = recipes[name]()
    changes = {"compile": options.compile, "device": device.type, "steps": WARMUP + options.steps}
    config = replace(config, **changes)
    return tiny(config) if options.tiny else config


def tiny(config: TrainConfig) -> TrainConfig:
    """Shrink a recipe: a tiny student, two images per step, and the smallest teacher of each family."""
    kin = {"clip": "scenes:clip", "dino": "dinov2:vits14", "sam": "scenes:sam"}
    teachers = tuple(
        replace(
            t,
            model=kin[t.name],
            resolution=112 if t.name == "dino" else None,
            student_resolution=t.student_resolution and 192,
            batch_size=t.batch_size and 1,
        )
        for t in config.teachers
    )
    student = "vitdet-tiny12" if config.student.startswith("vitdet") else "vit-tiny12"
    return replace(config, student=student, teachers=teachers, resolution=96, batch_size=2)


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} sees no GPU; start this where there is one, or see that it works "
            f"with --device cpu --tiny"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _peak(given: float | None, device: torch.device) -> float | None:
    known = (peak for word, peak in PEAKS.items() if word in _name(device))
    return given if given is not None else next(known, None)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--recipes", nargs="+", default=["paper-b14", "paper-h14"], choices=["paper-b14", "paper-h14"]
    )
    parser.add_argument("--steps", type=int, default=20, help=f"timed, after {WARMUP} others")
    parser.add_argument(
        "--batch", type=int, help="images a rank and step; as on the paper's 64 ranks if left out"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the student's blocks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of the recipe's")
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device, for MFU; known for A100, H100 and H200"
    )
    options = parser.parse_args()
    for name in ("steps", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value} cannot be; give 1 or more")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RadioError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)

"""Measure the overhead of the trainer: three ratios of one recipe's runs.

- The share of a step outside teachers, student, adaptors (forward and backward) and the optimiser: at most
  5 %. Timed from outside: hooks on the modules, and timers around the functions that the loop calls.
  Wall-clock time, every moment counted once; while the trainer waits for the thread that prefetches teacher
  features, the time counts towards what that thread does. There is one save in every 200 steps, as in the
  demo.
- Images/s of the loader alone, over those that the run consumes: at least 3.
- Speed of an epoch from an existing teacher cache, over that with the teachers online: at least 1.5.

    python benchmarks/trainer.py [--recipe demo] [--steps 200] [--warmup 10] [--threads 2] [--in-turn]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from radio.dist import Ranks
from train import losses, setup
from train.config import TrainConfig
from train.data import loader
from train.data.loader import Batch
from train.distributed import DistributedStudent
from train.loggers import JsonLines, ProgressConsole
from train.recipes import recipes
from train.trainer import Trainer

OUTSIDE, LOADING, CACHED = 0.05, 3.0, 1.5  # at most, at least, at least

TEACHERS, STUDENT, BACKWARD, OPTIMISER = (
    "teacher forward",
    "student and adaptor forward",
    "backward",
    "optimiser",
)
WORK = (TEACHERS, STUDENT, BACKWARD, OPTIMISER)
RESIZE, LOSSES, CLIPPING, DATA, LOGGING, SAVING, GLUE = (
    "resizing images",
    "losses",
    "the gradient's norm",
    "waiting for data",
    "logging",
    "saving",
    "glue: casts, draws, meters, the loop",
)
REST = (RESIZE, LOSSES, CLIPPING, DATA, LOGGING, SAVING, GLUE)
_BEHIND = "waiting for the teachers' thread"  # divided among the parts that this thread works on


class Span(NamedTuple):
    """A period in which one thread worked on one part."""

    part: str
    start: float
    end: float


class Lane:
    """The consecutive spans of one thread; entering a part pauses the enclosing one."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._parts = [GLUE]
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        """Start to count time for this part."""
        self._book()
        self._parts.append(part)

    def leave(self) -> None:
        """Continue to count time for the enclosing part."""
        self._book()
        self._parts.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        self.spans.append(Span(self._parts[-1], self._since, now))
        self._since = now


class Watch:
    """A lane for each thread, and the start and end of the measurement."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}
        self.start, self.end = 0.0, float("inf")

    @property
    def lane(self) -> Lane:
        """The lane of the calling thread."""
        return self._lanes.setdefault(threading.get_ident(), Lane())

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Count the time of a block for `part`."""
        self.lane.enter(part)
        try:
            yield
        finally:
            self.lane.leave()

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Wrap a function so that its calls are timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.inside(part):
                return call(*arguments, **named)

        return timed

    def pulled(self, call: Callable[..., Iterable[Any]], part: str) -> Callable[..., Iterator[Any]]:
        """Wrap a function that returns an iterable so that the production of each item is timed."""

        def items(*arguments: Any, **named: Any) -> Iterator[Any]:
            source, end = iter(call(*arguments, **named)), object()
            while True:
                with self.inside(part):
                    item = next(source, end)
                if item is end:
                    return
                yield item

        return items

    def hook(self, module: nn.Module, part: str) -> None:
        """Time a module's forward pass."""
        module.register_forward_pre_hook(lambda module, inputs: self.lane.enter(part))
        module.register_forward_hook(lambda module, inputs, output: self.lane.leave())

    def seconds(self) -> dict[str, float]:
        """Compute wall-clock seconds by part, for the calling thread."""
        own = self.lane
        others = [lane for lane in self._lanes.values() if lane is not own]
        found = dict.fromkeys((*WORK, *REST), 0.0)
        for span in self._counted(own.spans):
            if span.part != _BEHIND:
                found[span.part] += span.end - span.start
                continue
            left = span.end - span.start
            for other in (other for lane in others for other in lane.spans):
                shared = min(span.end, other.end) - max(span.start, other.start)
                if shared > 0:
                    found[other.part] += shared
                    left -= shared
            found[GLUE] += left
        return found

    def _counted(self, spans: list[Span]) -> Iterator[Span]:
        for part, start, end in spans:
            if end > self.start and start < self.end:
                yield Span(part, max(start, self.start), min(end, self.end))


def watch_run(run: Trainer, watch: Watch, warmup: int, stack: ExitStack) -> None:
    """Time every part of a run; counting starts after the warm-up."""
    for teacher in run.teachers.values():
        assert isinstance(teacher, nn.Module)
        watch.hook(teacher, TEACHERS)
    assert isinstance(run.model.student, nn.Module)
    for module in (run.model.student, *run.model.adaptors.values()):
        assert isinstance(module, nn.Module)
        watch.hook(module, STUDENT)
    optimizer = run.optimizer
    optimizer.register_step_pre_hook(lambda *_: watch.lane.enter(OPTIMISER))
    optimizer.register_step_post_hook(lambda *_: watch.lane.leave())
    for owner, name, part in (
        (torch.Tensor, "backward", BACKWARD),
        (loader, "resize_images", RESIZE),
        (setup, "resize_images", RESIZE),
        (losses, "teacher_losses", LOSSES),
        (losses, "centred_cosine", LOSSES),
        (DistributedStudent, "reduce_gradients", CLIPPING),
        (Trainer, "record", LOGGING),
        (JsonLines, "write", LOGGING),
        (ProgressConsole, "advance", LOGGING),
        (Trainer, "save", SAVING),
    ):
        stack.enter_context(patch.object(owner, name, watch.around(getattr(owner, name), part)))
    for name, part in (("open_stream", DATA), ("prefetch", _BEHIND)):
        stack.enter_context(patch.object(loader, name, watch.pulled(getattr(loader, name), part)))
    genuine = run.train_step

    def advance(batch: Batch) -> None:
        genuine(batch)
        if run.step + 1 == warmup:
            watch.start = time.perf_counter()

    stack.enter_context(patch.object(run, "train_step", advance))


def measure(config: TrainConfig, warmup: int) -> dict[str, float]:
    """Measure seconds by part over the steps after the warm-up."""
    watch = Watch()
    run = Trainer(config, Ranks(), torch.device("cpu"), Console(quiet=True))
    with ExitStack() as stack:
        watch_run(run, watch, warmup, stack)
        with watch.inside(GLUE):
            run.train()
    watch.end = time.perf_counter()
    return watch.seconds()


def rate(config: TrainConfig, warmup: int) -> float:
    """Measure the images/s of a run after the warm-up."""
    run = Trainer(config, Ranks(), torch.device("cpu"), Console(quiet=True))
    moments: list[float] = []
    genuine = run.train_step

    def advance(batch: Batch) -> None:
        genuine(batch)
        moments.append(time.perf_counter())

    with patch.object(run, "train_step", advance), patch.object(run, "save"):
        run.train()
    return (len(moments) - warmup) * run.partition.batch_size / (moments[-1] - moments[warmup - 1])


def loading_rate(config: TrainConfig, warmup: int) -> float:
    """Measure the images/s of the loader alone after the warm-up."""
    run = Trainer(config, Ranks(), torch.device("cpu"), Console(quiet=True))
    moments = []
    for _ in run.loader.rows(range(config.steps)):
        moments.append(time.perf_counter())
    return (len(moments) - warmup) * run.partition.batch_size / (moments[-1] - moments[warmup - 1])


def cached(config: TrainConfig, folder: Path, warmup: int) -> TrainConfig:
    """Return the config of the run in its second epoch, from a cache of the images of its measured steps."""
    count = (config.steps - warmup) * config.batch_size
    options = replace(config.cache, folder=folder, images=count, crops=1, confirm=False)
    return replace(config, cache=options, out=config.out.with_name("cached"))


def breakdown(seconds: dict[str, float], config: TrainConfig, steps: int, console: Console) -> float:
    """Print the time by part; return the share outside the four parts in `WORK`."""
    total = sum(seconds.values())
    work = sum(seconds[part] for part in WORK)
    order = "ahead of the step" if config.prefetch_teachers else "in turn"
    title = f"{config.recipe}: {config.student}, {len(config.teachers)} teachers {order}, {steps} steps"
    table = Table("part", title=f"{title}, {torch.get_num_threads()} threads")
    table.add_column("ms a step", justify="right")
    table.add_column("share", justify="right")

    def row(name: str, value: float) -> None:
        table.add_row(name, f"{1000 * value / steps:.2f}", f"{value / total:.1%}")

    for parts, name, whole in ((WORK, "these four", work), (REST, "the rest", total - work)):
        for part in parts:
            row(part, seconds[part])
        table.add_section()
        row(name, whole)
        table.add_section()
    row("the whole step", total)
    console.print(table)
    return 1 - work / total


def report(outside: float, loading: float, epochs: float, console: Console) -> bool:
    """Print the three ratios; return whether all meet their limits."""
    table = Table("ratio")
    for name in ("measured", "wanted", ""):
        table.add_column(name, justify="right")
    rows = (
        (
            "outside teachers, student, adaptors, optimiser",
            f"{outside:.1%}",
            f"<= {OUTSIDE:.0%}",
            outside <= OUTSIDE,
        ),
        ("loader alone / what the run takes", f"{loading:.2f}", f">= {LOADING}", loading >= LOADING),
        ("epoch from a cache / teachers online", f"{epochs:.2f}", f">= {CACHED}", epochs >= CACHED),
    )
    for name, found, wanted, fine in rows:
        table.add_row(name, found, wanted, "yes" if fine else "no")
    console.print(table)
    for name, found, _, _ in rows:
        sys.stdout.write(f"| {name} | {found} | `python benchmarks/trainer.py` |\n")
    return all(row[-1] for row in rows)


def main() -> int:
    """Measure and print the ratios; return 0 when all three meet their limits, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Three ratios of a training run.")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=200, help="steps measured")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them, 1 or more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--in-turn", action="store_true", help="teachers in the step, not ahead of it")
    parser.add_argument("--images", type=Path, help="images, for recipes that bring none")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    console = Console()
    recipe = recipes[chosen.recipe]()
    data = replace(recipe.data, images=(chosen.images,)) if chosen.images else recipe.data
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            recipe,
            steps=chosen.warmup + chosen.steps,
            out=Path(folder) / "online",
            cache=replace(recipe.cache, folder=None),
            data=data,
            device="cpu",
            prefetch_teachers=not chosen.in_turn,
            eval_every=0,
        )
        outside = breakdown(measure(config, chosen.warmup), config, chosen.steps, console)
        online = rate(replace(config, out=Path(folder) / "plain"), chosen.warmup)
        loading = loading_rate(replace(config, out=Path(folder) / "loading"), chosen.warmup) / online
        stored = rate(cached(config, Path(folder) / "cache", chosen.warmup), chosen.warmup)
    console.print(f"{online:.0f} images/s online, {stored:.0f} from a cache")
    return 0 if report(outside, loading, stored / online, console) else 1


if __name__ == "__main__":
    sys.exit(main())

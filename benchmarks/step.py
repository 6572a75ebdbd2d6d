"""Where does the time of a training step go?

The demo's own run, with its teachers online, timed from outside: hooks on the modules, and watches around the
functions that the loop calls. At least 90 % should lie in the teachers' forward, the student's and its
adaptors' forward, the backward and the optimiser; what is left is named. Times are exclusive: a part that is
called inside another is not counted twice. One save falls into every 200 steps, as in the demo.

    python benchmarks/step.py [--steps 200] [--warmup 10] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from evals.core.dist import Group
from train import step, trainer
from train.config import TrainConfig
from train.recipes import recipes
from train.sinks import JsonLines, ProgressConsole
from train.trainer import Run

WANTED = 0.90

TEACHERS, STUDENT, BACKWARD, OPTIMISER = (
    "teacher forward",
    "student and adaptor forward",
    "backward",
    "optimiser",
)
WORK = (TEACHERS, STUDENT, BACKWARD, OPTIMISER)
RESIZE, LOSSES, CLIPPING, DATA, LOGGING, SAVING, GLUE = (
    "resizing pictures",
    "losses",
    "clipping gradients",
    "waiting for data",
    "logging",
    "saving",
    "glue: casts, draws, zeroing gradients, meters, the loop",
)
REST = (RESIZE, LOSSES, CLIPPING, DATA, LOGGING, SAVING, GLUE)


class Watch:
    """Exclusive seconds by part; entering a part halts the one around it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*WORK, *REST), 0.0)
        self._parts = [GLUE]
        self._since = time.perf_counter()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        """From now on time belongs to this part."""
        self._book()
        self._parts.append(part)

    def leave(self) -> None:
        """From now on time belongs to what came before."""
        self._book()
        self._parts.pop()

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """The time of a block."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.inside(part):
                return call(*arguments, **named)

        return timed

    def hook(self, module: nn.Module, part: str) -> None:
        """Time a module's forward."""
        module.register_forward_pre_hook(lambda module, inputs: self.enter(part))
        module.register_forward_hook(lambda module, inputs, output: self.leave())

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now


def watch_run(run: Run, watch: Watch, warmup: int, stack: ExitStack) -> None:
    """Put the watch on every part of a run, and set it to zero once the warm-up is over."""
    for teacher in run.teachers.values():
        assert isinstance(teacher, nn.Module)
        watch.hook(teacher, TEACHERS)
    assert isinstance(run.model.student, nn.Module)
    for module in (run.model.student, *run.model.adaptors.values()):
        watch.hook(module, STUDENT)
    run.optimizer.register_step_pre_hook(lambda *_: watch.enter(OPTIMISER))
    run.optimizer.register_step_post_hook(lambda *_: watch.leave())
    for owner, name, part in (
        (torch.Tensor, "backward", BACKWARD),
        (step, "resize_images", RESIZE),
        (step, "teacher_losses", LOSSES),
        (step, "centred_cosine", LOSSES),
        (nn.utils, "clip_grad_norm_", CLIPPING),
        (Run, "record", LOGGING),
        (JsonLines, "write", LOGGING),
        (ProgressConsole, "advance", LOGGING),
        (Run, "save", SAVING),
    ):
        stack.enter_context(patch.object(owner, name, watch.around(getattr(owner, name), part)))

    def rows(loader: Iterable[Any]) -> Iterator[Any]:
        source = iter(loader)
        for number in range(run.config.steps + 1):
            if number == warmup:
                watch.reset()
            with watch.inside(DATA):
                row = next(source, None)
            if row is None:
                return
            yield row

    stack.enter_context(patch.object(trainer, "rows_of", rows))


def measure(config: TrainConfig, warmup: int, console: Console) -> dict[str, float]:
    """Seconds by part over the steps after the warm-up."""
    watch = Watch()
    run = Run(config, Group(), torch.device("cpu"), console)
    with ExitStack() as stack:
        watch_run(run, watch, warmup, stack)
        run.train()
    return watch.seconds


def report(seconds: dict[str, float], config: TrainConfig, steps: int, console: Console) -> float:
    """Print the table; the share of the four parts that are the work itself."""
    total = sum(seconds.values())
    share = sum(seconds[part] for part in WORK) / total
    title = f"{config.recipe}: {config.student}, {len(config.teachers)} teachers, batch {config.batch_size}"
    table = Table("part", title=f"{title}, {steps} steps, {torch.get_num_threads()} threads")
    table.add_column("ms a step", justify="right")
    table.add_column("share", justify="right")

    def row(name: str, value: float) -> None:
        table.add_row(name, f"{1000 * value / steps:.2f}", f"{value / total:.1%}")

    for part in WORK:
        row(part, seconds[part])
    table.add_section()
    row("these four", share * total)
    table.add_section()
    for part in REST:
        row(part, seconds[part])
    table.add_section()
    row("the whole step", total)
    console.print(table)
    console.print(f"{steps * config.batch_size / total:.0f} images/s; wanted in the four: {WANTED:.0%}")
    return share


def main() -> int:
    """0 when enough of a step is work, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Where the time of the demo's training step goes.")
    parser.add_argument("--steps", type=int, default=200, help="steps measured")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            recipes["demo"](), steps=chosen.warmup + chosen.steps, out=Path(folder) / "step", device="cpu"
        )
        seconds = measure(config, chosen.warmup, console)
    return 0 if report(seconds, config, chosen.steps, console) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())

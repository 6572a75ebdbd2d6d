"""Where does the time of a training step go?

The demo's own run, with its teachers online, timed from outside: hooks on the modules, and watches around the
functions that the loop calls. At least 90 % should lie in the teachers' forward, the student's and its
adaptors' forward, the backward and the optimiser; what is left is named.

Wall-clock time, every moment counted once. While the trainer waits for the thread in which its teachers work
ahead, the moment belongs to what that thread does. One save falls into every 200 steps, as in the demo.

    python benchmarks/step.py [--steps 200] [--warmup 10] [--threads 2] [--in-turn]
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
_BEHIND = "waiting for the teachers' thread"  # shared out over what that thread does


class Span(NamedTuple):
    """What one thread did from one moment to another."""

    part: str
    start: float
    end: float


class Lane:
    """The spans of one thread, one after another; entering a part halts the one around it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._parts = [GLUE]
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        """From now on time belongs to this part."""
        self._book()
        self._parts.append(part)

    def leave(self) -> None:
        """From now on time belongs to what came before."""
        self._book()
        self._parts.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        self.spans.append(Span(self._parts[-1], self._since, now))
        self._since = now


class Watch:
    """A lane for each thread, and the moments between which they count."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}
        self.start, self.end = 0.0, float("inf")

    @property
    def lane(self) -> Lane:
        """The lane of the calling thread."""
        return self._lanes.setdefault(threading.get_ident(), Lane())

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """The time of a block."""
        self.lane.enter(part)
        try:
            yield
        finally:
            self.lane.leave()

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.inside(part):
                return call(*arguments, **named)

        return timed

    def pulled(self, call: Callable[..., Iterable[Any]], part: str) -> Callable[..., Iterator[Any]]:
        """The same function that gives an iterator, the making of each item timed."""

        def items(*arguments: Any) -> Iterator[Any]:
            source, end = iter(call(*arguments)), object()
            while True:
                with self.inside(part):
                    item = next(source, end)
                if item is end:
                    return
                yield item

        return items

    def hook(self, module: nn.Module, part: str) -> None:
        """Time a module's forward."""
        module.register_forward_pre_hook(lambda module, inputs: self.lane.enter(part))
        module.register_forward_hook(lambda module, inputs, output: self.lane.leave())

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by part, for the calling thread."""
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


def watch_run(run: Run, watch: Watch, warmup: int, stack: ExitStack) -> None:
    """Put the watch on every part of a run; it counts once the warm-up is over."""
    for teacher in run.teachers.values():
        assert isinstance(teacher, nn.Module)
        watch.hook(teacher, TEACHERS)
    assert isinstance(run.model.student, nn.Module)
    for module in (run.model.student, *run.model.adaptors.values()):
        watch.hook(module, STUDENT)
    run.optimizer.register_step_pre_hook(lambda *_: watch.lane.enter(OPTIMISER))
    run.optimizer.register_step_post_hook(lambda *_: watch.lane.leave())
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
    for name, part in (("rows_of", DATA), ("ahead", _BEHIND)):
        stack.enter_context(patch.object(trainer, name, watch.pulled(getattr(trainer, name), part)))
    genuine = run.advance

    def advance(batch: trainer.Batch) -> None:
        genuine(batch)
        if run.step + 1 == warmup:
            watch.start = time.perf_counter()

    stack.enter_context(patch.object(run, "advance", advance))


def measure(config: TrainConfig, warmup: int, console: Console) -> dict[str, float]:
    """Seconds by part over the steps after the warm-up."""
    watch = Watch()
    run = Run(config, Group(), torch.device("cpu"), console)
    with ExitStack() as stack:
        watch_run(run, watch, warmup, stack)
        with watch.inside(GLUE):
            run.train()
    watch.end = time.perf_counter()
    return watch.seconds()


def report(seconds: dict[str, float], config: TrainConfig, steps: int, console: Console) -> float:
    """Print the table; the share of the four parts that are the work itself."""
    total = sum(seconds.values())
    share = sum(seconds[part] for part in WORK) / total
    order = "ahead of the step" if config.teachers_ahead else "in turn"
    teachers = f"{len(config.teachers)} teachers {order}"
    title = f"{config.recipe}: {config.student}, batch {config.batch_size}, {teachers}"
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
    parser.add_argument("--warmup", type=int, default=10, help="steps before them, 1 or more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--in-turn", action="store_true", help="teachers in the step, not ahead of it")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            recipes["demo"](),
            steps=chosen.warmup + chosen.steps,
            out=Path(folder) / "step",
            device="cpu",
            teachers_ahead=not chosen.in_turn,
        )
        seconds = measure(config, chosen.warmup, console)
    return 0 if report(seconds, config, chosen.steps, console) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())

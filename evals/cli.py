"""`radio-eval`: score any model on any task.

radio-eval knn runs/demo/ckpt.pt scenes:clip --k 10 20
radio-eval list --archs

Usage, the list of tasks and errors about their names come without torch, whose import takes seconds; what
runs is imported when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from rich.console import Console

from radio.config import parse_options
from radio.errors import ConfigError, did_you_mean

from .core import evaluators

if TYPE_CHECKING:
    from .core.evaluator import Evaluator

_OURS = {
    "knn": ("evals.knn.evaluator:KNN", "Weighted k-nearest-neighbour classification of frozen summaries."),
    "maps": (
        "evals.maps:MAPS",
        "The first three principal components of the tokens as colors, beside those of a student's teachers.",
    ),
    "sam": (
        "evals.sam_dropin.evaluator:SAM",
        "Masks of SAM's own decoder on the model's features, scored on COCO instances.",
    ),
    "seg": (
        "evals.seg_probe.evaluator:SEG",
        "Segmentation by a linear head on frozen tokens, with MMSegmentation.",
    ),
    "throughput": (
        "evals.throughput:THROUGHPUT",
        "Images per second, multiply-adds and memory of several models, measured in alternation.",
    ),
    "vqa": (
        "evals.vqa.evaluator:VQA",
        "Visual question answering by a LLaVA-1.5 on the model: GQA, VQAv2, TextVQA, ScienceQA.",
    ),
    "zeroshot": (
        "evals.zeroshot.evaluator:ZEROSHOT",
        "Classification by class names, and retrieval by captions, through a CLIP teacher's text tower.",
    ),
}
"""Where each evaluator is, imported when it is used, and its line in listings."""


def _register(name: str, place: str, line: str) -> None:
    def make() -> Evaluator[Any]:
        evaluator: Evaluator[Any] = resolve_name(place)
        return evaluator

    make.__doc__ = line
    evaluators.add(name, make)


for _name, (_place, _line) in _OURS.items():
    _register(_name, _place, _line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `radio-eval` and return its exit code: 0 when every report was written.

    Raises:
        RadioError: anything that the user can correct (the console script prints it and exits with 2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_usage(Console())
        return 0
    task, *rest = arguments
    if task in _COMMANDS:
        return _COMMANDS[task](rest)
    if task not in evaluators:
        known = list(dict.fromkeys([*evaluators, *_COMMANDS]))
        hint = did_you_mean(task, known) or f"; it has {', '.join(known)}"
        raise ConfigError(f"radio-eval has no command {task!r}{hint}")
    return _command("evaluate", task, rest)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions:
    """List the tasks that models are scored on."""

    archs: bool = False
    """List the architectures instead, with their parameters and multiply-adds."""


def _list(arguments: Sequence[str]) -> int:
    console = Console(highlight=False)
    if parse_options(ListOptions, arguments, prog="radio-eval list").archs:
        from .tables import print_architectures

        print_architectures(console)
    else:
        _print_tasks(console)
    return 0


def _throughput(arguments: Sequence[str]) -> int:
    from .reporting.figures import draw_tradeoff
    from .throughput import run_throughput

    return run_throughput(arguments, partial(draw_tradeoff, task="knn"))


def _reporting(command: str, arguments: Sequence[str]) -> int:
    from .reporting.command import run_compare, run_report, run_trend

    return {"compare": run_compare, "report": run_report, "trend": run_trend}[command](arguments)


def _command(name: str, *arguments: Any) -> int:
    from . import commands

    code: int = getattr(commands, name)(*arguments)
    return code


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "all": partial(_command, "evaluate_all"),
    "noise": partial(_command, "evaluate_noise"),
    "list": _list,
    "throughput": _throughput,
    **{name: partial(_reporting, name) for name in ("compare", "report", "trend")},
}

_USAGE = """\
usage: radio-eval TASK MODEL... [options]
       radio-eval all MODEL... [--tasks ...] [--TASK.option ...]
       radio-eval noise MODEL [--repeats N] [--tasks ...]
       radio-eval throughput MODEL... [--reference MODEL]
       radio-eval list [--archs]
       radio-eval report REPORTS --html PAGE [--run runs/NAME]
       radio-eval compare REPORTS --baseline REPORTS [options]
       radio-eval trend NIGHTS --html PAGE
"""


def _print_usage(console: Console) -> None:
    console.print(_USAGE, markup=False, highlight=False)
    _print_tasks(console)
    console.print("\nradio-eval TASK --help prints a task's options.", highlight=False)


def _print_tasks(console: Console) -> None:
    for name in evaluators:
        console.print(f"{name:12} {_summary(name)}", markup=False, highlight=False)


def _summary(name: str) -> str:
    return (evaluators[name].__doc__ or "").strip().split("\n")[0]

"""A printed plan: the work and memory of each rank, and the cost of the whole run."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from radio.errors import shown

from .plan import Memory, RunPlan
from .sinks import say

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print a table with a column per group, and a line for every figure of the whole run."""
    world = plan.partition.world
    ranks = f"{world} ranks" if world > 1 else "1 rank"
    turns = ", the groups in turn" if len(plan.kinds) < len(plan.partition.groups) else ""
    table = Table(
        title=Text(
            shown(f"{plan.config.recipe}: {plan.config.student} on {ranks}{turns}, {plan.config.parallel}")
        ),
        box=box.ROUNDED if console.is_terminal else box.ASCII,
    )
    table.add_column("teachers")
    for name in (*(group.name for group in plan.partition.groups), "all"):
        table.add_column(Text(shown(name)), justify="right")
    _add_work(table, plan)
    table.add_section()
    _add_memory(table, plan)
    console.print(table)
    for line in _lines(plan):
        say(console, line)


def _add_work(table: Table, plan: RunPlan) -> None:
    groups, costs = plan.partition.groups, [plan.costs[group.name] for group in plan.partition.groups]
    size, letter = _scale(max(cost.flops for cost in costs))

    def row(name: str, values: list[object], whole: object = "") -> None:
        table.add_row(name, *map(str, values), str(whole))

    row("their pixels", [" ".join(str(plan.sizes[t][0]) for t in group.teachers) for group in groups])
    row("the student's pixels", [group.side for group in groups])
    row("ranks", [len(group.ranks) for group in groups], plan.partition.world)
    row("images a rank and step", [group.share for group in groups])
    row("images a step", [group.batch_size for group in groups], plan.partition.batch_size)
    for part in ("teacher", "forward", "backward"):
        counts = [getattr(cost, f"{part}_flops") for cost in costs]
        row(f"{letter}FLOP a rank and step, {part}", [f"{count / size:.3g}" for count in counts])
    row("seconds a step", [f"{plan.seconds[g.name]:.3g}" for g in groups], f"{plan.step_seconds:.3g}")
    row("idle", [f"{plan.idle_shares[group.name]:.0%}" for group in groups], f"{plan.idle:.0%}")


def _add_memory(table: Table, plan: RunPlan) -> None:
    size, letter = _scale(max(kind.memory.peak for kind in plan.kinds))
    alike = len(plan.kinds) == 1
    for part in Memory._fields:
        amounts = [getattr(kind.memory, part) for kind in plan.kinds]
        if any(amounts):
            shown = [f"{amount / size:.3g}" for amount in amounts]
            blanks = [""] * (len(table.columns) - 1 - len(shown))
            cells = [*blanks, *shown] if alike else [*shown, *blanks]
            table.add_row(f"{letter}B on a rank, {part}", *cells)


def _scale(largest: float) -> tuple[float, str]:
    """Return the divisor for a number and its unit prefix."""
    return next(((size, letter) for size, letter in _SCALES if largest >= size), _SCALES[-1])


def _lines(plan: RunPlan) -> Iterator[str]:
    config = plan.config
    size, letter = _scale(plan.flops)
    products = "bfloat16" if plan.half else "float32"
    yield f"operations: {plan.flops / size:.4g} {letter}FLOP a step, matrix products in {products}"
    if plan.options.measured is not None:
        pace = f"as {plan.options.measured} measured"
    else:
        known = "--peak-tflops" if config.peak_tflops else "an A100's; give --peak-tflops"
        pace = f"at {plan.options.utilisation:.0%} of {plan.peak_tflops:g} TFLOP/s ({known})"
    hours = plan.days * 24 * plan.partition.world
    yield f"time: {config.steps} steps in {_time(plan.days)} {pace}; {hours:.4g} hours of one device"
    samples = config.steps * plan.partition.batch_size
    if plan.passes is None:
        yield f"data: {samples} images; give --images, how many there are, for the number of passes"
    else:
        yield f"data: {samples} images, {plan.passes:.3g} passes"
    if (better := plan.proposal) is not None:
        split = " ".join(map(str, better.split))
        yield f"faster: --ranks-per-group {split}, {better.after:.3g} s a step instead of {better.before:.3g}"
    elif len(plan.kinds) > 1:
        yield "no other --ranks-per-group is faster"


def _time(days: float) -> str:
    units = ((1.0, "days"), (1 / 24, "hours"), (1 / 1440, "minutes"))
    size, unit = next((pair for pair in units if days >= pair[0]), (1 / 86400, "seconds"))
    return f"{days / size:.1f} {unit}"

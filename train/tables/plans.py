"""What the rows of tables cost: ranks, memory, days and device hours, without training anything."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from radio.errors import shown

from ..config import PlanOptions, TrainConfig
from ..loggers import say
from ..plan import make_plan
from ..setup import round_resolutions
from .layout import Runs, without_seed


class RowCost(NamedTuple):
    """The cost of training a row, or all of them."""

    name: str
    student: str
    runs: int
    ranks: int
    gigabytes: float  # of the busiest rank
    step_seconds: float | None  # None for several rows
    days: float  # of all its runs
    hours: float  # of a device, of all its runs


def plan_rows(runs: Runs, options: PlanOptions, price: float | None, console: Console) -> None:
    """Print a line for each run and their sum.

    Args:
        runs: their settings by name; those that differ in their seed alone are planned once.
        options: assumptions of the plans.
        price: of a device hour, in any currency; None = no column of it.
        console: where to print.

    Raises:
        ConfigError: as `make_plan`.
    """
    style = box.ROUNDED if console.is_terminal else box.ASCII
    table = Table(title="training, without the evaluations", box=style)
    table.add_column("row", overflow="fold")
    table.add_column("student", overflow="fold")
    heads = ["runs", "ranks", "GB a rank", "s a step", "days", "device hours"]
    for head in (*heads, *(["price"] if price is not None else [])):
        table.add_column(head, justify="right")
    costs, plan = [], None
    for name, group in _by_row(runs).items():
        config, changes = round_resolutions(group[0])
        for line in changes:
            say(console, f"{name}: {line}")
        plan = make_plan(config, options)
        days = plan.days * len(group)
        costs.append(
            RowCost(
                name=name,
                student=config.student,
                runs=len(group),
                ranks=plan.partition.world,
                gigabytes=max(kind.memory.peak for kind in plan.kinds) / 1e9,
                step_seconds=plan.step_seconds,
                days=days,
                hours=days * 24 * plan.partition.world,
            )
        )
    for cost in costs:
        table.add_row(*map(Text, (shown(cost.name), shown(cost.student))), *_cells(cost, price))
    table.add_section()
    whole = RowCost(
        name="all, one after another",
        student="",
        runs=sum(cost.runs for cost in costs),
        ranks=max((cost.ranks for cost in costs), default=0),
        gigabytes=max((cost.gigabytes for cost in costs), default=0.0),
        step_seconds=None,
        days=sum(cost.days for cost in costs),
        hours=sum(cost.hours for cost in costs),
    )
    table.add_row(whole.name, "", *_cells(whole, price))
    console.print(table)
    if plan is not None:
        say(console, f"at {plan.options.utilisation:.0%} of {plan.peak_tflops:g} TFLOP/s a rank")


def _by_row(runs: Runs) -> dict[str, list[TrainConfig]]:
    """Group runs that differ in their seed alone."""
    rows: dict[str, list[TrainConfig]] = {}
    for name, config in runs.items():
        rows.setdefault(without_seed(name), []).append(config)
    return rows


def _cells(cost: RowCost, price: float | None) -> list[str]:
    step = "" if cost.step_seconds is None else f"{cost.step_seconds:.3g}"
    cells = [str(cost.runs), str(cost.ranks), f"{cost.gigabytes:.1f}", step]
    days = "<0.01" if cost.days < 0.01 else f"{cost.days:,.2f}" if cost.days < 100 else f"{cost.days:,.0f}"
    cells += [days, f"{cost.hours:,.0f}"]
    return cells if price is None else [*cells, f"{cost.hours * price:,.0f}"]

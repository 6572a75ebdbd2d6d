"""What the rows of tables cost: ranks, memory, days and device hours, without training anything."""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from radio.errors import shown

from ..config import PlanOptions
from ..loggers import say
from ..plan import make_plan
from ..setup import round_resolutions
from .layout import Runs


class RowCost(NamedTuple):
    """The cost of training one row."""

    name: str
    student: str
    ranks: int
    gigabytes: float  # of the busiest rank
    step_seconds: float
    days: float

    @property
    def hours(self) -> float:
        """Device hours."""
        return self.days * 24 * self.ranks


def plan_rows(runs: Runs, options: PlanOptions, price: float | None, console: Console) -> list[RowCost]:
    """Print a line for each run and their sum; return the costs.

    Args:
        runs: their settings by name; runs that differ in nothing that costs are planned once.
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
    heads = ["ranks", "GB a rank", "s a step", "days", "device hours"]
    for head in (*heads, *(["price"] if price is not None else [])):
        table.add_column(head, justify="right")
    costs, plan = [], None
    for name, given in runs.items():
        config, changes = round_resolutions(given)
        for line in changes:
            say(console, f"{name}: {line}")
        plan = make_plan(config, options)
        costs.append(
            RowCost(
                name=name,
                student=config.student,
                ranks=plan.partition.world,
                gigabytes=max(kind.memory.peak for kind in plan.kinds) / 1e9,
                step_seconds=plan.step_seconds,
                days=plan.days,
            )
        )
    for cost in costs:
        cells = (
            f"{cost.gigabytes:.1f}",
            f"{cost.step_seconds:.3g}",
            f"{cost.days:.2f}",
            f"{cost.hours:,.0f}",
        )
        money = [] if price is None else [f"{cost.hours * price:,.0f}"]
        table.add_row(Text(shown(cost.name)), Text(shown(cost.student)), str(cost.ranks), *cells, *money)
    table.add_section()
    hours, days = sum(cost.hours for cost in costs), sum(cost.days for cost in costs)
    ranks = max((cost.ranks for cost in costs), default=0)
    memory = max((cost.gigabytes for cost in costs), default=0.0)
    money = [] if price is None else [f"{hours * price:,.0f}"]
    table.add_row(
        "all, one after another", "", str(ranks), f"{memory:.1f}", "", f"{days:.2f}", f"{hours:,.0f}", *money
    )
    console.print(table)
    if plan is not None:
        say(console, f"at {plan.options.utilisation:.0%} of {plan.peak_tflops:g} TFLOP/s a rank")
    return costs

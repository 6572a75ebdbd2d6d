"""Table 3: the same student from CLIP and DINOv2 with each way of balancing their losses (appendix D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from evals.core.paper import TABLE_3
from radio.errors import ConfigError

from ..balance_curves import show_weights
from ..config import BalanceConfig, TrainConfig
from ..tables import PaperTable, Rows, tables
from .paper import paper_b14
from .scenes import TEACHERS, demo

_BALANCERS = {
    "naive": BalanceConfig(),
    "uncertainty": BalanceConfig(kind="uncertainty"),
    "adaloss": BalanceConfig(kind="adaloss"),
    "amtml-kd": BalanceConfig(kind="amtml"),
}


@tables.register("table3")
def table3() -> PaperTable:
    """Compare the four balancers on the scenes: k-NN, zero-shot and probe in one table, weights over time."""
    base = replace(
        demo(),
        recipe="table3",
        out=Path("runs/table3"),
        teachers=TEACHERS[:2],  # the counterparts of CLIP and DINOv2, as in the paper's table
        steps=1200,
        log_every=20,
        score=("zeroshot", "knn", "seg"),
    )
    return PaperTable(base=base, rows=_balanced, finish=_finish)


@tables.register("table3-paper")
def table3_paper() -> PaperTable:
    """Reproduce table 3 at the paper's size: `paper-b14` with each balancer."""
    base = replace(paper_b14(), recipe="table3-paper", out=Path("runs/table3-paper"))
    return PaperTable(base=base, rows=_balanced, finish=_finish)


def _balanced(base: TrainConfig) -> Rows:
    if base.balance != BalanceConfig():
        raise ConfigError(
            "the rows of table 3 are the balancers; leave --balance out, or choose with --rows: "
            + ", ".join(_BALANCERS)
        )
    return {
        name: replace(base, recipe=f"{base.recipe} {name}", balance=balance)
        for name, balance in _BALANCERS.items()
    }


def _finish(rows: Rows, checkpoints: Mapping[str, Path], out: Path, console: Console) -> None:
    """Print scores of all students and teachers above the paper's rows, and the weights over time."""
    first = next(iter(rows.values()))
    if first.score:
        from ..scoring import score  # imported late: it imports all evaluators

        score(first, checkpoints, out / "reports", console, TABLE_3)
    show_weights({name: path.parent for name, path in checkpoints.items()}, out, console)

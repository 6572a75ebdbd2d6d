"""Table 3: the same student from CLIP and DINOv2 with each way of balancing their losses (appendix D)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from evals.core.paper import TABLE_3

from ..balance_curves import show_weights
from ..config import BalanceConfig, TrainConfig
from ..tables import PaperTable, tables
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
    """The four balancers on the scenes: k-NN, zero-shot and probe in one table, weights over time."""
    return _balanced(
        replace(
            demo(),
            recipe="table3",
            out=Path("runs/table3"),
            teachers=TEACHERS[:2],  # the parts of CLIP and DINOv2, as in the paper's table
            steps=1200,
            log_every=20,
            score=("zeroshot", "knn", "seg"),
        )
    )


@tables.register("table3-paper")
def table3_paper() -> PaperTable:
    """Table 3 at its own size: `paper-b14` with each balancer."""
    return _balanced(replace(paper_b14(), recipe="table3-paper", out=Path("runs/table3-paper")))


def _balanced(config: TrainConfig) -> PaperTable:
    rows = {
        name: replace(config, recipe=f"{config.recipe} {name}", balance=balance)
        for name, balance in _BALANCERS.items()
    }
    return PaperTable(rows=rows, paper=TABLE_3, show=show_weights)

"""The paper's tables 2, 3 and 5, which ask the same at both sizes: one recipe, and what is changed in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from evals.core.paper import TABLE_2, TABLE_3, TABLE_5

from ..config import BalanceConfig, TrainConfig
from .layout import OTHERS, VQA, Line, Runs, Size, TableLayout


def spatial_losses(size: Size, base: TrainConfig, runs: Sequence[str], labels: Sequence[str]) -> TableLayout:
    """Return table 2: spatial losses of no teacher, of one, of both.

    Args:
        size: of the table.
        base: its recipe, with two teachers.
        runs: names of the runs without, with the first teacher's, with the second's, and with both.
        labels: of their lines.
    """

    def make_runs(base: TrainConfig) -> Runs:
        first, second = base.teachers
        made = {}
        for run, weights in zip(runs, ((0, 0), (1, 0), (0, 1)), strict=False):
            teachers = tuple(
                replace(teacher, spatial_weight=weight)
                for teacher, weight in zip((first, second), weights, strict=True)
            )
            made[run] = replace(base, teachers=teachers)
        return {**made, runs[-1]: base}

    return TableLayout(
        name="table2",
        title="whose spatial features are matched",
        size=size,
        base=base,
        columns=OTHERS,
        lines=tuple(
            Line(label=label, run=run, paper=row, against="" if label == labels[0] else labels[0])
            for label, run, row in zip(labels, runs, TABLE_2, strict=True)
        ),
        make_runs=make_runs,
    )


def balancing(size: Size, base: TrainConfig, naive: str, prefix: str = "") -> TableLayout:
    """Return table 3: how the losses are balanced.

    Args:
        size: of the table.
        base: its recipe.
        naive: name of the run with fixed weights.
        prefix: of the other runs' names.
    """
    kinds: Mapping[str, BalanceConfig] = {
        naive: BalanceConfig(),
        f"{prefix}uncertainty": BalanceConfig(kind="uncertainty"),
        f"{prefix}adaloss": BalanceConfig(kind="adaloss"),
        f"{prefix}amtml": BalanceConfig(kind="amtml"),
    }
    papers = [*TABLE_3, None]  # AMTML-KD is in the text alone: worse than naive
    labels = ("naive", "uncertainty", "AdaLoss", "AMTML-KD")
    return TableLayout(
        name="table3",
        title="how the losses are balanced",
        size=size,
        base=base,
        columns=OTHERS,
        lines=tuple(
            Line(label=label, run=run, paper=row, against="" if run == naive else labels[0])
            for label, run, row in zip(labels, kinds, papers, strict=True)
        ),
        make_runs=lambda base: {name: replace(base, balance=kind) for name, kind in kinds.items()},
    )


def pooling(size: Size, base: TrainConfig, run: str) -> TableLayout:
    """Return table 5: the class token as summary, or average pooling.

    Args:
        size: of the table.
        base: its recipe, with the class token.
        run: name of the run of that recipe.
    """
    labels = {"class token": run, "average pooling": "mean"}
    probes = (*OTHERS, "voc") if size == "paper" else OTHERS
    return TableLayout(
        name="table5",
        title="class token or average pooling",
        size=size,
        base=base,
        columns=("summary_loss", "feature_loss", *probes, *VQA),
        lines=tuple(
            Line(label=label, run=own, paper=row, against="" if own == run else "class token")
            for (label, own), row in zip(labels.items(), TABLE_5, strict=True)
        ),
        make_runs=lambda base: {run: base, "mean": replace(base, summary="mean")},
    )

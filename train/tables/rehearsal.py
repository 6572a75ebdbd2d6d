"""Rehearse the rows of tables at their real architecture, without weights, data or a cluster.

Every row's models are built without weights and run on fake tensors, forward and backward, at the size and
batch of one rank; its optimizer is built, its evaluators' settings and the sizes of their images are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from evals.core.task import make_evaluator
from radio.errors import RadioError, shown
from radio.hub import choose_window, load_teacher
from radio.model import RadioModel

from ..checkpoints import describe_teachers
from ..config import PlanOptions, TrainConfig
from ..losses import make_balancer
from ..optim import make_optimizer
from ..plan import build_meta_models, make_plan
from ..setup import round_resolutions
from .layout import without_seed
from .making import Row, evaluation_settings


def rehearse(rows: Sequence[Row], options: PlanOptions, console: Console) -> int:
    """Rehearse rows, with a line for each; return how many cannot be made.

    Args:
        rows: students are trained for a step on fake tensors; teachers only see the evaluators' sizes. Of
            those that differ in their seed alone, the first is rehearsed.
        options: the number of ranks.
        console: where to print.
    """
    table = Table(title="rehearsal", box=box.ROUNDED if console.is_terminal else box.ASCII)
    for head in ("row", "model", "a step", "optimizer", "evaluators' pixels"):
        table.add_column(head, overflow="fold")
    failed, first = 0, dict[str, Row]()
    for row in rows:
        first.setdefault(without_seed(row.name), row)
    for row in first.values():
        try:
            cells = _rehearse_teacher(row) if row.spec else _rehearse_student(row, options)
        except RadioError as error:
            failed += 1
            cells = [row.spec or row.config.student, f"FAILED: {error}", "", ""]
        table.add_row(Text(shown(row.name)), *(Text(shown(cell)) for cell in cells))
    console.print(table)
    return failed


def _rehearse_teacher(row: Row) -> list[str]:
    return [row.spec, "", "", _sizes(row, load_teacher(row.spec, meta=True))]


def _rehearse_student(row: Row, options: PlanOptions) -> list[str]:
    config, _ = round_resolutions(row.config)
    plan = make_plan(config, options)  # builds all models, and runs each group's step
    world, memory = plan.partition.world, max(kind.memory.peak for kind in plan.kinds) / 1e9
    models = build_meta_models(config)
    told = {"resolution": config.resolution, "teachers": describe_teachers(config, models.facts)}
    model = RadioModel(models.model.config, told)
    return [
        config.student,
        f"{plan.partition.batch_size} images, {world} rank{'s' * (world > 1)}, {memory:.1f} GB",
        _optimizer(config, model),
        _sizes(row, model),
    ]


def _optimizer(config: TrainConfig, model: RadioModel) -> str:
    """Build the optimizer on meta weights, with what the balancer learns; describe its groups."""
    selected = list(config.teachers)
    balancer = make_balancer(config.balance, selected, model.summary_dim)
    with torch.device("meta"):
        whole = nn.ModuleDict({"model": model.to("meta"), "balancer": balancer.to("meta")})
    groups = make_optimizer(whole, config.optim).param_groups
    decayed = sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]) / 1e6
    total = sum(p.numel() for group in groups for p in group["params"]) / 1e6
    return f"{config.optim.kind}, {total:.1f} M weights, {decayed:.1f} M decayed"


def _sizes(row: Row, model: Any) -> str:
    """Describe the size at which each evaluator gives the model images; only its name where it has several.

    Raises:
        ConfigError, SizeError: an evaluator's settings do not fit the model.
    """
    described = []
    settings = evaluation_settings(row, anywhere=True)
    for evaluation in row.evaluations:
        evaluator, own = make_evaluator(evaluation.task), settings[evaluation.key]
        seen = choose_window(model, evaluation.window, model.name)
        if evaluator.input_size is None:
            described.append(evaluation.key)
            continue
        height, width = evaluator.input_size(seen, own)
        described.append(
            f"{evaluation.key} {height}" if height == width else f"{evaluation.key} {height}x{width}"
        )
    return ", ".join(described)

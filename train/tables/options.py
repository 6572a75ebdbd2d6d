"""Options of a table's command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from radio.config import Count, NotNegative

from ..config import PlanOptions, TrainConfig
from .layout import Size


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCommand:
    """Make a table: train and score its rows, those that are done excepted, and print it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    size: Size = "small"  # the paper's, or minutes a row on the generated world
    rows: tuple[str, ...] = ()  # only these rows, on this node; () = all
    seeds: Count | None = None
    """Runs of each row; None = three in small (table 6: one), one at the paper's size."""
    results: Path | None = None  # folder of the rows' results; None = results/ in --out
    page: Path | None = None  # also write the tables as this markdown page
    minutes: NotNegative | None = None  # begin no further row after this time; the same command goes on
    restart: bool = False  # make every row again
    allow_pipes: bool = False  # run the data root's shard commands (pipe:COMMAND)
    collect: bool = False  # only print what the results give, and write it
    plan: bool = False  # only print what the training costs
    rehearse: bool = False  # only try every row at its real architecture without weights and data
    price_per_gpu_hour: NotNegative | None = None  # for a column of money in the plan
    planning: Annotated[PlanOptions, tyro.conf.arg(name="")] = field(default_factory=PlanOptions)

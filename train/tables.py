"""Tables of the paper made again: one run per row, and the comparison of all.

Table 3 compares the balancers of the losses, table 6 efficient students under one recipe. Each has a version
on the generated world, which takes minutes or hours on two cores, and the paper's own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.core.paper import TABLE_3, TABLE_6_MODELS, table_6_row
from evals.knn import KnnSettings
from evals.zeroshot import ZeroshotSettings
from radio.errors import ConfigError, MissingExtraError, did_you_mean, require, shown
from radio.io import write_bytes, write_text
from radio.registry import Registry
from radio.students import resolve_options

from .config import BalanceConfig, DataConfig, OptimConfig, TeacherConfig, TrainConfig
from .loggers import LOG, read_records, say
from .recipes import DINO, SCENES_TEACHERS, demo, paper_b14
from .tasks import task_settings

Rows: TypeAlias = Mapping[str, TrainConfig]
"""Runs by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """The runs behind a table, one per row."""

    base: TrainConfig  # the shared settings; `out` is the table's folder, with a subfolder per row
    rows: Callable[[TrainConfig], Rows]  # the rows by name, from the base with command-line overrides
    compare: Callable[[Rows, Mapping[str, Path], Path, Console], None]  # rows, checkpoints, table's folder


tables: Registry[Callable[[], PaperTable]] = Registry("table")


def rows_of(table: PaperTable, base: TrainConfig, names: tuple[str, ...] = ()) -> dict[str, TrainConfig]:
    """Return the named rows (default: all) in the table's order, each in a separate folder.

    Raises:
        ConfigError: the table has no such row, or no rows with these settings.
    """
    rows = table.rows(base)
    for name in names:
        if name not in rows:
            hint = did_you_mean(name, rows) or f"; it has {', '.join(rows)}"
            raise ConfigError(f"the table has no row {name!r}{hint}")
    return {
        name: replace(config, out=base.out / name.replace(":", "-"))
        for name, config in rows.items()
        if not names or name in names
    }


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
        teachers=SCENES_TEACHERS[:2],  # the counterparts of CLIP and DINOv2, as in the paper's table
        steps=1200,
        batch_size=16,
        optim=OptimConfig(lr=1.5e-3, betas=(0.9, 0.98), warmup=0.05),  # AdamW, as in the paper
        log_every=20,
        save_every=400,
        eval_every=0,
        score=("zeroshot", "knn", "seg"),
    )
    return PaperTable(base=base, rows=_row_per_balancer, compare=_compare_balancers)


@tables.register("table3-paper")
def table3_paper() -> PaperTable:
    """Reproduce table 3 at the paper's size: `paper-b14` with each balancer."""
    base = replace(paper_b14(), recipe="table3-paper", out=Path("runs/table3-paper"))
    return PaperTable(base=base, rows=_row_per_balancer, compare=_compare_balancers)


def _row_per_balancer(base: TrainConfig) -> Rows:
    if base.balance != BalanceConfig():
        raise ConfigError(
            "the rows of table 3 are the balancers; leave --balance out, or choose with --rows: "
            + ", ".join(_BALANCERS)
        )
    return {
        name: replace(base, recipe=f"{base.recipe} {name}", balance=balance)
        for name, balance in _BALANCERS.items()
    }


def _compare_balancers(rows: Rows, checkpoints: Mapping[str, Path], out: Path, console: Console) -> None:
    """Print scores of all students and teachers above the paper's rows, and the weights over time."""
    first = next(iter(rows.values()))
    if first.score:
        from .scoring import num_workers, score  # imported late: it imports all evaluators

        score(first, checkpoints, out / "reports", console, TABLE_3, workers=num_workers(first))
    show_weights({name: path.parent for name, path in checkpoints.items()}, out, console)


class WeightCurve(NamedTuple):
    """The weight of one loss of one teacher in one run."""

    run: str
    teacher: str
    kind: str  # summary or spatial
    steps: tuple[int, ...]
    weights: tuple[float, ...]


def show_weights(runs: Mapping[str, Path], out: Path, console: Console) -> None:
    """Print the weights at five steps, and write `weights.csv` and `weights.svg` to `out`.

    Args:
        runs: run folders by name; those without weights in the log are skipped.
        out: folder of the files.
        console: where to print.

    Raises:
        MissingExtraError: matplotlib is not installed; the CSV is still written.
    """
    curves = [curve for name, folder in runs.items() for curve in read_weights(name, folder)]
    if not curves:
        return
    longest = max((curve.steps for curve in curves), key=len)
    steps = list(dict.fromkeys(longest[round(part * (len(longest) - 1) / 4)] for part in range(5)))
    table = _table(console, "weight at step", map(str, steps))
    for curve in curves:
        weights = dict(zip(curve.steps, curve.weights, strict=True))
        cells = (f"{weights[step]:.3f}" if step in weights else "" for step in steps)
        table.add_row(Text(shown(f"{curve.run}: {curve.teacher} {curve.kind}")), *cells)
    console.print(table)
    write_text(out / "weights.csv", as_csv(curves))
    write_bytes(out / "weights.svg", as_svg(curves))
    say(console, f"weights over time: {out / 'weights.svg'}, {out / 'weights.csv'}")


def read_weights(name: str, folder: Path) -> list[WeightCurve]:
    """Read the curves from a run folder's log; empty when its balancer has fixed weights."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(folder / LOG):
        for key, value in record.items():
            if key.endswith("_weight") and "/" in key and isinstance(value, (int, float)):
                points.setdefault(key, []).append((int(record["step"] or 0), float(value)))
    curves = []
    for key, pairs in points.items():
        teacher, kind = key.removesuffix("_weight").rsplit("/", 1)
        steps, weights = zip(*pairs, strict=True)
        curves.append(WeightCurve(name, teacher, kind, steps, weights))
    return curves


def as_csv(curves: Sequence[WeightCurve]) -> str:
    """Format the curves as CSV with one line per run, teacher, loss and step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "teacher", "loss", "step", "weight"))
    for curve in curves:
        for step, weight in zip(curve.steps, curve.weights, strict=True):
            writer.writerow((curve.run, curve.teacher, curve.kind, step, f"{weight:.6g}"))
    return text.getvalue()


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's palette
_LINES = {"summary": "-", "spatial": "--"}
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "weights", "font.size": 9, "legend.frameon": False}


def as_svg(curves: Sequence[WeightCurve]) -> bytes:
    """Plot a panel per run: a colour per teacher, solid lines for summaries, dashed lines for tokens.

    The output is deterministic: the same curves give the same bytes. The report page's plots have neither
    panels nor legends, so this one is drawn here.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", extra="report")
    style = require("matplotlib.style", extra="report")
    figures = require("matplotlib.figure", extra="report")
    runs = list(dict.fromkeys(curve.run for curve in curves))
    teachers = list(dict.fromkeys(curve.teacher for curve in curves))
    buffer = io.BytesIO()
    with style.context(_STYLE, after_reset=True):  # ignore a matplotlibrc in the working folder
        figure = figures.Figure(figsize=(3.2 * len(runs), 2.8), layout="constrained")
        for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            for curve in (each for each in curves if each.run == run):
                colour = _COLOURS[teachers.index(curve.teacher) % len(_COLOURS)]
                label = f"{curve.teacher} {curve.kind}".replace("$", r"\$")  # not a formula
                axes.plot(curve.steps, curve.weights, color=colour, linestyle=_LINES[curve.kind], label=label)
            axes.set(title=run, xlabel="step", ylim=(0, None))
            axes.legend(fontsize=7)
        figure.axes[0].set_ylabel("weight of the loss")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


ALL = "all"
"""Name that stands for all of `STUDENTS`."""

STUDENTS: tuple[str, ...] = tuple(
    name
    for name in TABLE_6_MODELS
    if not name.startswith(("dinov2:", "openclip:")) and name not in ("vit-l14", "vit-h14")
)
"""The paper's table 6 without its two large ViTs, which take hours on a CPU even in the small version."""

SPEED: Mapping[str, Any] = {"batches": (8,)}
"""Settings of the measurement of speed."""


@tables.register("table6")
def table6() -> PaperTable:
    """Reproduce a small table 6 on the generated world, for --student NAME or all students."""
    base = TrainConfig(
        recipe="table6",
        out=Path("runs/table6"),
        student=ALL,
        teachers=SCENES_TEACHERS[:2],  # small counterparts of CLIP and DINOv2; the paper uses no SAM here
        resolution=96,
        steps=400,
        batch_size=16,
        data=DataConfig(scenes=200_000, crop_scale=(0.7, 1.0), workers=1),
        optim=OptimConfig(lr=1e-3, warmup=0.05),
        log_every=20,
        save_every=100,
        score=("knn", "zeroshot"),
        # few images, and as many for the slowest student as for the fastest
        tasks={"knn": KnnSettings(scenes=(1200, 300)), "zeroshot": ZeroshotSettings(scenes=300)},
    )
    return PaperTable(base=base, rows=_row_per_student, compare=_compare_students)


@tables.register("table6-paper")
def table6_paper() -> PaperTable:
    """Reproduce the paper's table 6: OpenCLIP H/14 and DINOv2 g/14, ImageNet-21k, batch 4096 (§5.1)."""
    openclip = TeacherConfig(
        name="clip",
        model="openclip:ViT-H-14@weights/open_clip_vit_h14_laion2b_s32b_b79k.bin",
        resolution=224,
    )
    base = TrainConfig(
        recipe="table6-paper",
        out=Path("runs/table6-paper"),
        student=ALL,
        teachers=(openclip, DINO),
        resolution=224,
        steps=600_000,
        batch_size=4096,
        data=DataConfig(shards=("data/imagenet21k/{0000..2047}.tar",), workers=8),
        save_every=2000,
        log_every=100,
    )
    return PaperTable(base=base, rows=_row_per_student, compare=_compare_students)


def _row_per_student(base: TrainConfig) -> Rows:
    """Return one run per student, each at the valid size nearest to the resolution."""
    names = STUDENTS if base.student == ALL else (base.student,)
    return {name: replace(base, student=name, resolution=_nearest_side(name, base)) for name in names}


def _nearest_side(name: str, base: TrainConfig) -> int:
    options = resolve_options(name, base.options)
    if options.has("image_size"):  # built for the resolution
        return base.resolution
    import torch  # imported late: `radio-train --help` need not wait for it

    from radio.model import make_student

    with torch.device("meta"):
        return make_student(name, options).nearest_size(base.resolution, base.resolution)[0]


def _compare_students(rows: Rows, checkpoints: Mapping[str, Path], out: Path, console: Console) -> None:
    """Score and measure every student, if the run has tasks to score; print all beside the paper's figures.

    Scores that exist and are unchanged are not computed again.
    """
    config = next(iter(rows.values()))
    if not config.score:
        return
    from evals.reporting.figures import draw_tradeoff  # imported late: these import all evaluators
    from evals.throughput import ThroughputSettings
    from evals.throughput.evaluator import MeasuredModel, report_all
    from radio.hub import load_backbone
    from radio.progress import watch_on

    from .scoring import run_models

    progress, reports = watch_on(console, shown=console.is_terminal), out / "reports"
    models = {name: load_backbone(str(path)) for name, path in checkpoints.items()}
    tasks = task_settings(config, config.score)
    scores = {
        name: [outcome.headline for outcome in outcomes]
        for name, outcomes in run_models(config, checkpoints, tasks, reports, console).items()
    }
    entries = [MeasuredModel(name=name, model=model, paper_name=name) for name, model in models.items()]
    settings = ThroughputSettings(**SPEED)
    speeds = report_all(entries, settings, reports, device=config.device, progress=progress)
    columns = (*config.score, "images/s")
    table = _table(console, "student", (*columns, *(f"paper: {column}" for column in columns)))
    for name, speed in zip(models, speeds, strict=True):
        row = table_6_row(name)
        paper = [None if row is None else row.values.get(key) for key in (*config.score, "images_per_second")]
        rate = speed.metrics["images_per_second"].value
        cells = ("" if value is None else f"{value:g}" for value in paper)
        table.add_row(Text(shown(name)), *scores[name], f"{rate:.4g}", *cells)
    console.print(table)
    try:
        draw_tradeoff(reports, "knn")
    except MissingExtraError as error:
        say(console, f"no plot: {error}")


def _table(console: Console, title: str, columns: Iterable[str]) -> Table:
    """Make a table with a column of names and columns of numbers."""
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII)
    table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table

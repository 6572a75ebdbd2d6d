"""Other tasks' scores over the side of the input: a model whose features change at some size shows a dip.

The first RADIO models did above some 700 px ("mode switching", RADIOv2.5, arXiv 2412.07679): there the text
tower of CLIP no longer understood them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from evals.core.blocks import Lines
from evals.core.evaluator import EvalRun, Result
from evals.core.report import Metric, Record
from evals.core.stats import Values, interval, resampled_sums
from evals.core.task import make_evaluator
from evals.reporting.compare import METRIC_OF
from radio.errors import SizeError
from radio.types import Backbone

from . import ResolutionSettings, Task, sides_of

# Letters: S sides, R resamples, U units, P parts.


class Scored(NamedTuple):
    """A sample's score."""

    part: str
    id: str
    unit: str  # what the bootstrap draws
    score: float

    @classmethod
    def of(cls, record: Record) -> Scored:
        """Read a record."""
        id, unit = str(record["id"]), record.get("unit")
        return cls(record.get("part", ""), id, id if unit is None else str(unit), record["score"])


_FACTORS = (2 / 3, 1.0, 3 / 2, 2.0, 3.0)  # of the model's own side (ours)


def missing_requirements(model: Backbone) -> str:
    """Explain why the model has no curve; empty if it has."""
    return f"{model.name} takes images of one size only" if model.fixed_size else ""


def evaluate(model: Backbone, settings: ResolutionSettings, run: EvalRun) -> Result:
    """Score a model by each task's own evaluator at each side.

    Raises:
        SizeError: the model takes fewer than two sizes in place of the sides, or one has too many pixels.
        RadioError: as the tasks' evaluators say.
    """
    sides = choose_sides(model, settings)
    tasks, notes = choose_tasks(model, settings)
    indices, metrics = dict[str, Metric](), dict[str, Metric]()
    results: list[Result] = []
    blocks: list[Lines] = []
    for task in tasks:
        scored = [_score(model, task, settings, side, run) for side in sides]
        results += [result for result, _ in scored]
        name = next(iter(results[-1].metrics))
        values = [result.metrics[name] for result, _ in scored]
        key = task.replace("-", "_")
        indices[f"{key}_index"] = _index(values, [scores for _, scores in scored], run.settings.seed)
        metrics |= {f"{key}_{name}_{side}px": m for side, m in zip(sides, values, strict=True)}
        blocks.append(_draw(task, name, sides, values))
    return Result(
        metrics={"index": min(indices.values(), key=lambda metric: metric.value), **indices, **metrics},
        data=list(dict.fromkeys(info for result in results for info in result.data)),
        blocks=blocks,
        notes=[*notes, *dict.fromkeys(note for result in results for note in result.notes)],
        resolved={"sides": sides, "tasks": tasks},
    )


def choose_sides(model: Backbone, settings: ResolutionSettings) -> list[int]:
    """Return the sides to score at, ascending, without those that the model rounds to the size of another.

    Of several with one size the side that needs no rounding is taken, or else the least.

    Raises:
        SizeError: they are fewer than two.
    """
    own = model.native_size[0]
    sides = settings.sides or [
        model.nearest_size(side, side)[0] for side in (round(f * own) for f in _FACTORS)
    ]
    order = sorted(sides, key=lambda side: (model.nearest_size(side, side) == (side, side), -side))
    sizes = {model.nearest_size(side, side): side for side in order}  # of equal sizes the last one stays
    if len(sizes) < 2:
        height, width = next(iter(sizes))
        raise SizeError(
            f"{model.name} takes {height}x{width} px in place of each side of {', '.join(map(str, sides))}, "
            f"and a curve needs two; give other --sides"
        )
    return sorted(sizes.values())


def choose_tasks(model: Backbone, settings: ResolutionSettings) -> tuple[list[Task], list[str]]:
    """Return the tasks to score, and a note on each that is left out since the model lacks something."""
    chosen = settings.chosen_tasks
    if settings.tasks is not None:
        return list(chosen), []
    missing = {task: make_evaluator(task).missing_requirements(model) for task in chosen}
    notes = [f"{task} is left out: {lack}" for task, lack in missing.items() if lack]
    return [task for task, lack in missing.items() if not lack], notes


def _score(
    model: Backbone, task: Task, settings: ResolutionSettings, side: int, run: EvalRun
) -> tuple[Result, list[Scored]]:
    """Run a task's evaluator at one side; return its result, and the scores of its samples where it has them.

    What it would show of single images is dropped.
    """
    with TemporaryDirectory(prefix="am-radio-resolution-") as folder:
        part = EvalRun(run.settings, base=task, folder=Path(folder), ranks=run.ranks, progress=run.progress)
        part.damage = run.damage
        own: Any = settings.of_tasks()[task]
        taken = side
        if task in ("seg", "open-vocab") and (taken := min(model.nearest_size(side, side))) != side:
            run.notes.append(f"{side} px was asked for; {model.name} takes {taken}, which {task} used")
        own = replace(own, **dict.fromkeys(sides_of(task), taken))
        result: Result = make_evaluator(task).evaluate(model, own, part)
        scores = [Scored.of(record) for record in result.records if "score" in record]
    run.sources |= part.sources
    run.notes += [note for note in part.notes if note not in run.notes]
    return result, scores


def _index(values: Sequence[Metric], scores: Sequence[list[Scored]], seed: int) -> Metric:
    """Divide the worst value by the best, in percent; of errors, where less is better, the best by the worst.

    Its interval is a bootstrap over units, such as images, where all sides scored the same samples and their
    mean, over the parts of a task, is the value.
    """

    def ratio(curves: Values) -> Values:
        least, most = curves.min(axis=-1), curves.max(axis=-1)
        share: Values = 100 * least / np.where(most > 0, most, 1.0)
        return share

    given = np.array([metric.value for metric in values])
    low = high = None
    if scores[0] and all(sorted(map(_place, each)) == sorted(map(_place, scores[0])) for each in scores):
        sums = np.stack([_sums(each) for each in scores], axis=1)  # [U, S, 2, P]
        mean = METRIC_OF["mean"]  # as `radio-eval compare` computes it
        if np.allclose(mean(sums.sum(axis=0)), given, rtol=0, atol=0.01):
            resampled = resampled_sums(sums, seed=seed)  # [R, S, 2, P]
            curves = mean(resampled.reshape(-1, *resampled.shape[2:]))
            low, high = interval(ratio(curves.reshape(resampled.shape[:2])))
    return Metric(value=float(ratio(given)), low=low, high=high)


def _place(scored: Scored) -> tuple[str, str, str]:
    return scored.part, scored.id, scored.unit


def _sums(scores: Sequence[Scored]) -> Values:
    """Sum the scores of each unit and part, and count them: [U, 2, P]."""
    units = {name: row for row, name in enumerate(sorted({each.unit for each in scores}))}
    parts = {name: row for row, name in enumerate(sorted({each.part for each in scores}))}
    sums = np.zeros((len(units), 2, len(parts)))
    rows = [units[each.unit] for each in scores]
    columns = [parts[each.part] for each in scores]
    np.add.at(sums[:, 0], (rows, columns), [each.score for each in scores])
    np.add.at(sums[:, 1], (rows, columns), 1)
    return sums


def _draw(task: Task, name: str, sides: Sequence[int], values: Sequence[Metric]) -> Lines:
    title = make_evaluator(task).title
    return Lines(
        title=f"{title} over the side",
        x_label="side (px)",
        y_label=f"{name} ({values[0].unit})",
        x=tuple(map(float, sides)),
        y=tuple(metric.value for metric in values),
        low=tuple(metric.low for metric in values),
        high=tuple(metric.high for metric in values),
        log_x=True,
        caption="Scores over the side of the input, with 95 % intervals.",
    )

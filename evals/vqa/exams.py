"""The benchmarks of a run: opened and checked first, answered at the end, scored, written as JSONL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from evals.core.report import DataUsed, Metric, Table
from radio.chunks import Damage
from radio.dist import Group
from radio.errors import ConfigError

from .benchmarks import files_below, write_benchmarks
from .scoring.scores import mean_accuracy
from .settings import VqaSettings
from .tasks import TASKS, Scores, Task, TaskData, open_task


class Answers(NamedTuple):
    """The answers to the questions of one benchmark, by question id."""

    seen: Mapping[str, str]
    blind: Mapping[str, str] | None = None  # without the images


class Marked(NamedTuple):
    """A benchmark with its answers and their scores."""

    data: TaskData
    answers: Answers
    scores: Scores
    blind: Scores | None


def open_exams(
    settings: VqaSettings, scenes: int, cache: Path, group: Group, damage: Damage
) -> list[TaskData]:
    """Open the benchmarks that the settings name: one in its own files, or those of the generated world.

    Args:
        scenes: number of images of the generated world.
        damage: collects damaged files of the cache.

    Raises:
        ConfigError: the model is trained on other data than the generated world, and no benchmark is named.
        DataError: files that are absent or not the benchmark's, or absent images.
    """
    files = settings.files
    if files is not None:
        assert settings.task is not None, "checked by the settings"
        data = open_task(settings.task, files, rule=settings.answer_normalization, limit=settings.limit)
        data.check()
        return [data]
    if settings.instruct_data is not None:
        raise ConfigError(
            "--stages has score and no benchmark was named; give --task with --questions and --images, or "
            "leave score out"
        )
    root = cache / "scenes" / f"vqa-benchmarks-v2-{scenes}-seed{settings.seed}"
    if group.leads:
        write_benchmarks(root, scenes, settings.seed, damage=damage)
    group.barrier()
    written = files_below(root)
    tasks: tuple[Task, ...] = TASKS if settings.task is None else (settings.task,)
    opened = [open_task(task, written[task], limit=settings.limit) for task in tasks]
    for data in opened:
        data.check()
    return opened


def mark(data: TaskData, answers: Answers, allow_missing: bool) -> Marked:
    """Score the answers.

    Raises:
        DataError: questions without an answer, or answers to other questions.
    """
    blind = None if answers.blind is None else data.score(answers.blind, allow_missing)
    return Marked(data, answers, data.score(answers.seen, allow_missing), blind)


def metrics(marked: list[Marked], seed: int) -> dict[str, Metric]:
    """Compute the accuracies: the mean, each benchmark, both without images, then each kind of question.

    The means are `accuracy` and `blind_accuracy`; intervals are bootstraps over images.
    """
    seen = {one.data.task: one.scores for one in marked}
    blind = {one.data.task: one.blind for one in marked if one.blind is not None}
    found: dict[str, Metric] = {}
    kinds: dict[str, Metric] = {}
    for prefix, scores in (("", seen), ("blind_", blind)):
        if scores:
            found[f"{prefix}accuracy"] = mean_accuracy(list(scores.values()), seed)
        for task, one in scores.items():
            values = one.metrics(seed)
            found[f"{prefix}{task}"] = values.pop("accuracy")
            if not prefix:
                kinds |= {f"{task}_{name}": metric for name, metric in values.items()}
    return found | kinds


def tables(marked: list[Marked]) -> dict[str, Table]:
    """Return tables with the accuracy of each kind of question."""
    return {f"{one.data.task}_{name}": table for one in marked for name, table in one.scores.tables().items()}


def data_used(data: TaskData) -> DataUsed:
    """Return a benchmark's row in the report."""
    return DataUsed(
        role="questions",
        name=f"{data.task} {data.split}",
        fingerprint=data.fingerprint,
        count=len(data.questions),
        num_classes=0,
    )


def records_of(one: Marked) -> str:
    """Return one JSON line per question with answer, right answer and score, which can be scored again."""
    lines = []
    asked = dict(zip(one.scores.ids, one.scores.values, strict=True))
    for question, expected in zip(one.data.questions, one.data.expected, strict=True):
        record = {
            "question_id": question.id,
            "image": question.image,
            "question": question.text,
            "answer": one.answers.seen.get(question.id, ""),
            "expected": expected,
            "score": asked[question.id],
        }
        if one.answers.blind is not None:
            record["blind"] = one.answers.blind.get(question.id, "")
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)

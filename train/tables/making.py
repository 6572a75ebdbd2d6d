"""Train and score what tables show, row by row; each result is a small file, and none is made twice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.core.report import Report, file_name
from evals.core.suite import Contestant, Outcome, run_contestants
from evals.core.task import RunSettings, make_evaluator, missing_data, settings_on
from evals.reporting.compare import StoredReport, block_sums
from evals.vqa.benchmarks import open_benchmark
from radio.config import defaults_of, difference, from_plain, to_plain
from radio.datasets import SET_NAMES, DataSets, read_data_sets
from radio.dist import Ranks
from radio.errors import ConfigError, shown
from radio.hub import load_backbone
from radio.progress import watch_on
from radio.resources import choose_device, describe_device

from ..config import TrainConfig
from ..scoring import num_workers, tell
from ..tasks import task_settings
from .layout import SOURCES, VQA, Evaluation, Runs, TableLayout, seeds_of
from .paper_size import place_weights
from .results import (
    NUM_BLOCKS,
    RowResult,
    Score,
    deciding_settings,
    final_losses,
    merge,
    read_result,
    write_result,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A model that tables show, and what it is scored on: a run's student, or a teacher."""

    name: str
    config: TrainConfig  # of the run; for a teacher, of a table that shows it
    spec: str = ""  # of the teacher, with its file where the tables name it
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the model, as plain data."""
        return {"model": self.spec} if self.spec else deciding_settings(self.config)


def rows_of(tables: Sequence[tuple[TableLayout, Runs]]) -> list[Row]:
    """Return the rows of tables with their runs: teachers first, what several tables show once.

    Raises:
        ConfigError: two tables have different runs of one name.
    """
    rows: dict[str, Row] = {}
    for table, runs in tables:
        base = next(iter(runs.values()), replace(table.base, out=table.base.out / table.name))
        for line in table.lines:
            models = [(line.model.partition("@")[0], base, line.model)] if line.model else []
            models += [(name, runs[name], "") for name in (seeds_of(runs, line.run) if line.run else ())]
            for name, config, spec in models:
                scored = [each for each in table.evaluations([line]) if each.task in config.score]
                row = Row(name=name, config=config, spec=spec, evaluations=tuple(scored))
                first = rows.get(name, row)
                if first.settings != row.settings:
                    raise ConfigError(f"two tables have different runs called {name}; make them one by one")
                tasks = [each.task for each in row.evaluations]
                if task_settings(first.config, tasks) != task_settings(config, tasks):
                    raise ConfigError(f"two tables score {name} by different settings; make them one by one")
                both = dict.fromkeys((*first.evaluations, *row.evaluations))
                rows[name] = replace(first, evaluations=tuple(both))
    return sorted(rows.values(), key=lambda row: not row.spec)


def evaluation_settings(row: Row, *, anywhere: bool = False) -> dict[str, Any]:
    """Return the settings of a row's evaluations by their keys.

    Args:
        row: the row.
        anywhere: without a data root, pretend that every data set is there (for a rehearsal).

    Raises:
        ConfigError: a data set is not there, or no data root although the row needs one.
    """
    config, settings = row.config, {}
    for evaluation in row.evaluations:
        task = make_evaluator(evaluation.task)
        own = task_settings(config, [evaluation.task])[evaluation.task]
        own = replace(own, **dict(evaluation.options))
        if name := evaluation.data_set:
            placed = settings_on(task, own, _data_sets(config, anywhere=anywhere))
            if name not in placed:
                assert config.data_root is not None, "everything is everywhere"
                raise ConfigError(f"{task.name}: {missing_data(task, own, config.data_root)}")
            own = placed[name]
            if task.name == "vqa" and not anywhere:
                _check_benchmarks(own, config)
        settings[evaluation.key] = own
    return settings


def _check_benchmarks(own: Any, config: TrainConfig) -> None:
    """Check that a data root has all benchmarks that the tables show, and a language model.

    Raises:
        ConfigError: it lacks one.
        DataError: TextVQA's OCR tokens are neither in a file of their own nor in the questions.
    """
    lacks = [name for name in VQA if SOURCES[name].metric not in own.benchmarks]
    lacks += ["language-model"] if own.language_model is None else []
    if lacks:
        raise ConfigError(
            f"vqa: {shown(str(config.data_root))} has not {', '.join(lacks)}, which the tables need; name it "
            f"there, or leave vqa out by --score"
        )
    text_vqa = own.benchmarks["textvqa"]
    if text_vqa.ocr and text_vqa.ocr_file is None:
        open_benchmark("textvqa", text_vqa)  # not after the training


def _data_sets(config: TrainConfig, *, anywhere: bool) -> DataSets:
    if config.data_root is not None:
        return read_data_sets(config.data_root)
    if anywhere:
        return from_plain(DataSets, {name.replace("-", "_"): f"data/{name}" for name in SET_NAMES})
    raise ConfigError(
        "the paper's tables are scored on your data sets: give --data-root, a data.yaml that names them"
    )


def is_done(row: Row, results: Path) -> bool:
    """Check whether a row's result is there, of the same model, with all scores that the tables need.

    Raises:
        DataError: the result is damaged.
    """
    result = read_result(results, row.name)
    return result is not None and is_current(row, result) and set(protocols_of(row)) <= set(result.protocols)


def is_current(row: Row, result: RowResult) -> bool:
    """Check whether a result is of the row's model and scored as the row is; scores may be missing."""
    if difference(result.settings, row.settings, _defaults(row)):
        return False
    return not any(
        difference(result.protocols[key], to_plain(own), defaults_of(own))
        for key, own in protocols_of(row).items()
        if key in result.protocols
    )


def _defaults(row: Row) -> dict[str, Any]:
    """Return the defaults of the settings that decide a row's model."""
    return {} if row.spec else defaults_of(row.config)


def protocols_of(row: Row) -> dict[str, Any]:
    """Return the settings of each of a row's evaluations by its key; of data sets not where they are."""
    protocols = {}
    for evaluation in row.evaluations:
        own = task_settings(row.config, [evaluation.task])[evaluation.task]
        protocols[evaluation.key] = replace(own, **dict(evaluation.options))
    return protocols


def score_row(
    row: Row,
    checkpoint: Path | None,
    results: Path,
    console: Console,
    ranks: Ranks,
    seconds: Mapping[str, float],
    *,
    restart: bool,
) -> bool:
    """Score a row and write its result; return whether nothing failed. Every rank takes part.

    Args:
        row: the row.
        checkpoint: of the student; None for a teacher.
        results: folder of the results; the reports themselves stay in the run's folder.
        console: where to report.
        ranks: that score together.
        seconds: that the training took.
        restart: replace an earlier result, instead of adding to it.
    """
    started, config = time.monotonic(), row.config
    out = config.out / "reports" if checkpoint else config.out.parent / "teachers"
    settings = evaluation_settings(row)
    model = str(checkpoint or place_weights(row.spec, config))
    named: dict[str, list[Evaluation]] = {}
    for evaluation in row.evaluations:
        named.setdefault(_report_name(row, evaluation), []).append(evaluation)
    outcomes = run_contestants(
        [
            Contestant(
                name=name,
                load=partial(load_backbone, model, window=group[0].window),
                tasks={evaluation.task: settings[evaluation.key] for evaluation in group},
                out=out,
            )
            for name, group in named.items()
        ],
        run=RunSettings(device=config.device),
        workers=num_workers(config, ranks),
        progress=watch_on(console, shown=console.is_terminal),
        log=partial(tell, console),
        ranks=ranks,
    )
    if ranks.leads:
        by_key = {
            evaluation.key: outcome
            for name, group in named.items()
            for evaluation, outcome in zip(group, outcomes[name], strict=True)
        }
        result = RowResult(
            name=row.name,
            settings=row.settings,
            student="" if row.spec else config.student,
            values=final_losses(config.out, [t.name for t in config.teachers]) if checkpoint else {},
            scores={key: _scores(outcome, out) for key, outcome in by_key.items() if outcome.report},
            protocols={
                key: to_plain(own) for key, own in protocols_of(row).items() if by_key[key].state != "failed"
            },
            data={key: _scored_data(outcome.report) for key, outcome in by_key.items() if outcome.report},
            left_out={key: o.reason for key, o in by_key.items() if o.state == "left out"},
            seconds={**seconds, "score": round(time.monotonic() - started, 1)},
            device=describe_device(choose_device(config.device)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_result(
            results, result if restart else merge(read_result(results, row.name), result, _defaults(row))
        )
    return all(outcome.state != "failed" for each in outcomes.values() for outcome in each)


def _report_name(row: Row, evaluation: Evaluation) -> str:
    """Name the model of one evaluation's report, which stands beside those of others of the same task."""
    special = evaluation.key.removeprefix(evaluation.task)
    return f"{row.name}{special}"


def _scored_data(report: Report) -> tuple[str, ...]:
    """Describe the data that a report's scores are of; equal data give equal texts."""
    return tuple(
        f"{data.name}: {data.count:,} ({data.fingerprint[:12]})" for data in report.data if data.scored
    )


def _scores(outcome: Outcome, folder: Path) -> dict[str, Score]:
    """Return the metrics of a report that the paper's columns show."""
    report = outcome.report
    assert report is not None
    scores = {}
    for name in dict.fromkeys(source.metric for source in SOURCES.values() if source.task == report.task):
        if (metric := report.metrics.get(name)) is None:
            continue
        score = Score(value=round(metric.value, 4), low=_rounded(metric.low), high=_rounded(metric.high))
        if name == report.primary_metric:
            path = folder / f"{file_name(report.task, report.model)}.json"
            blocks = block_sums(StoredReport(report, path), NUM_BLOCKS)
            if blocks is not None:
                kept = tuple(
                    tuple(tuple(round(v, 4) for v in row) for row in block) for block in blocks.tolist()
                )
                score = replace(score, pairing=report.pairing, blocks=kept)
        scores[name] = score
    return scores


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

"""Collect the results of rows into tables: on the console, as a page in markdown, and as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from evals.reporting.paper_tables import (
    MadeTable,
    MadeTables,
    TableCell,
    TableCurve,
    TableDifference,
    TableLine,
    markdown_table,
    read_tables,
)
from radio.config import defaults_of, to_plain
from radio.config import difference as setting_difference
from radio.errors import shown
from radio.io import write_text

from ..tasks import task_settings
from .layout import LOSSES, OF_THE_RUN, SOURCES, SPREADS, Line, Runs, TableLayout, seeds_of
from .making import is_current, rows_of
from .results import RowResult, Score, read_result
from .speed import Speed, read_speed
from .verdicts import difference, judge, judge_claim, rank_agreement

_TITLES = {
    "summary_loss": "summary loss",
    "feature_loss": "spatial loss",
    "parameters": "parameters (M)",
    "images_per_second": "images/s",
}
_WIDEST = 10_000  # characters, for a table that is measured
_FEWEST = 4  # students whose order a rank correlation describes


def collect(tables: Sequence[tuple[TableLayout, Runs]], results: Path) -> MadeTables:
    """Collect tables from the results of their rows; what is not done is left empty.

    Raises:
        DataError: a result is damaged.
    """
    return MadeTables(tables=tuple(_collect(table, runs, results) for table, runs in tables))


def _collect(table: TableLayout, runs: Runs, results: Path) -> MadeTable:
    speed = read_speed(results, table.name) if table.measures_speed else {}
    found = {line.label: _results(line, runs, results) for line in table.lines}
    table = replace(table, columns=tuple(_wanted_columns(table, found)))
    cells = {
        line.label: [_cell(table, line, found[line.label], column, speed) for column in table.columns]
        for line in table.lines
    }
    lines = tuple(
        TableLine(
            label=line.label,
            paper_label="" if line.paper is None else line.paper.model,
            seeds=_count(line, runs, found[line.label]),
            cells=tuple(cells[line.label]),
        )
        for line in table.lines
    )
    differences, not_compared = _differences(table, found)
    remarks = [*_recipe_remarks(table), *table.remarks, *_agreements(table, cells), *not_compared]
    remarks += [*_seeds_remarks(table, runs, found, results), *_settings_remarks(table, runs, results)]
    remarks += _data_remarks(table, found)
    if table.measures_speed and not speed:
        remarks.append(
            f"images/s: not measured yet; radio-train {table.name} without --rows and --collect does that "
            f"once no row is left to make."
        )
    remarks += [
        f"{line.paper.model} (paper): {line.paper.remark}"
        for line in table.lines
        if line.paper and line.paper.remark
    ]
    return MadeTable(
        name=table.name,
        title=table.title,
        columns=tuple(column_title(column, table) for column in table.columns),
        lines=lines,
        differences=tuple(differences),
        remarks=tuple(dict.fromkeys(remarks)),  # two lines may show one of the paper's
        claims=table.makes_claims,
        curves=tuple(
            TableCurve(
                title=curve.title,
                x_label="side (px)",
                x=curve.x,
                columns=tuple(column_title(column, table) for column in curve.columns),
            )
            for curve in table.curves
        ),
    )


def _wanted_columns(table: TableLayout, found: Mapping[str, Sequence[RowResult]]) -> Iterator[str]:
    """Yield a table's columns without those of tasks that are scored on request and were not."""
    for column in table.columns:
        source = SOURCES.get(column)
        if (
            source is None
            or source.task not in table.by_request
            or any(_scores(table, line, found[line.label], column) for line in table.lines)
        ):
            yield column


def column_title(column: str, table: TableLayout) -> str:
    """Return a column's title: the paper's name, or in small what stands for it."""
    if column in OF_THE_RUN:
        return _TITLES[column]
    if column in SPREADS:
        return f"{SPREADS[column][1]}: largest - smallest"
    return SOURCES[column].title if table.size == "small" else column


def _results(line: Line, runs: Runs, results: Path) -> list[RowResult]:
    """Read the results of a line that are there: of each seed, or of the teacher."""
    names = [line.model.partition("@")[0]] if line.model else seeds_of(runs, line.run)
    return [result for name in names if (result := read_result(results, name)) is not None]


def _count(line: Line, runs: Runs, found: Sequence[RowResult]) -> str:
    if line.model:
        return "" if found else "0"
    wanted = len(seeds_of(runs, line.run))
    return str(wanted) if len(found) == wanted else f"{len(found)} of {wanted}"


def _scores(table: TableLayout, line: Line, found: Sequence[RowResult], column: str) -> list[Score]:
    """Return the scores of a line in a column, one per seed that has it."""
    if column in SPREADS:
        of_each = [_scores(table, line, found, each) for each in SPREADS[column][0]]
        complete = all(len(scores) == len(found) for scores in of_each)
        return [spread(scores) for scores in zip(*of_each, strict=True)] if complete else []
    if column in LOSSES and not (line.columns and column not in line.columns):
        values = [result.values[column] for result in found if column in result.values]
        several = len(values) > 1  # a loss is of all the run's images: seeds alone make it uncertain
        return [Score(value=v, low=v if several else None, high=v if several else None) for v in values]
    evaluation = table.evaluation(line, column)
    if evaluation is None:
        return []
    metric = SOURCES[column].metric
    scores = [result.scores.get(evaluation.key, {}).get(metric) for result in found]
    return [score for score in scores if score is not None]


def spread(scores: Sequence[Score]) -> Score:
    """Subtract the smallest score from the largest; the interval is that of two independent ones."""
    high, low = (choose(scores, key=lambda score: score.value) for choose in (max, min))
    halves = [
        (each.high - each.low) / 2 for each in (high, low) if each.low is not None and each.high is not None
    ]
    value, half = high.value - low.value, math.hypot(*halves)
    if len(halves) < 2:
        return Score(value=value)
    return Score(value=value, low=value - half, high=value + half)


def _cell(
    table: TableLayout, line: Line, found: Sequence[RowResult], column: str, speed: Mapping[str, Speed]
) -> TableCell:
    if line.columns and column not in line.columns:
        return TableCell()
    paper = None if line.paper is None else line.paper.values.get(column)
    if column in ("parameters", "images_per_second"):
        measured = speed.get(line.label)
        return TableCell(value=None if measured is None else getattr(measured, column), paper=paper)
    if column in OF_THE_RUN:
        values = [result.values[column] for result in found if column in result.values]
        return TableCell(value=sum(values) / len(values) if values else None, paper=paper)
    scores = _scores(table, line, found, column)
    if not scores:
        return TableCell(paper=paper)
    nothing = Score(value=0.0, low=0.0, high=0.0)
    alone = difference(scores, [nothing], trained=(not line.model, False))
    half = None if alone.low is None else alone.value - alone.low
    return TableCell(value=alone.value, half=half, paper=paper)


def _differences(
    table: TableLayout, found: Mapping[str, Sequence[RowResult]]
) -> tuple[list[TableDifference], list[str]]:
    """Compare each line with the one that it stands against, in each column that both have.

    Returns:
        the differences, and a line for each that has no meaning, as the two were scored by other settings.
    """
    lines = {line.label: line for line in table.lines}
    made, not_compared = [], []
    for line in table.lines:
        if not line.against:
            continue
        other = lines[line.against]
        for column in table.columns:
            ours = _scores(table, line, found[line.label], column)
            theirs = _scores(table, other, found[other.label], column)
            gap, claim = _gap(line, other, column), line.claims.get(column)
            if not ours or not theirs or (gap is None and claim is None):
                continue
            sides = [(line, found[line.label]), (other, found[other.label])]
            if column not in LOSSES and not _scored_alike(table, sides, column):
                not_compared.append(
                    f"{column_title(column, table)} of {line.label} and {other.label}: scored by different "
                    f"settings or on different data, and not compared."
                )
                continue
            gained = difference(ours, theirs, trained=(not line.model, not other.model))
            if column in LOSSES and gained.low is None:
                continue  # of one seed: nothing says how far another's loss would be
            made.append(
                TableDifference(
                    line=line.label,
                    against=other.label,
                    column=column_title(column, table),
                    value=round(gained.value, 4),
                    low=None if gained.low is None else round(gained.low, 4),
                    high=None if gained.high is None else round(gained.high, 4),
                    paper=None if gap is None else round(gap, 4),
                    claim=claim or "",
                    verdict=(judge(gained, gap) if claim is None else judge_claim(gained, claim)) or "",
                )
            )
    return made, not_compared


def _gap(line: Line, other: Line, column: str) -> float | None:
    """Return the paper's difference of two lines; None where it has none."""
    papers = [each.paper.values.get(column) if each.paper else None for each in (line, other)]
    return None if papers[0] is None or papers[1] is None else papers[0] - papers[1]


def _scored_alike(table: TableLayout, sides: Sequence[tuple[Line, Sequence[RowResult]]], column: str) -> bool:
    """Check that lines with scores in a column have them by the same settings, on the same data."""
    first = SPREADS[column][0][0] if column in SPREADS else column
    protocols: list[Mapping[str, Any]] = []
    data: set[tuple[str, ...]] = set()
    for line, found in sides:
        evaluation = table.evaluation(line, first)
        assert evaluation is not None, "the line has scores in the column"
        scored = [result for result in found if evaluation.key in result.scores]
        protocols += [result.protocols.get(evaluation.key, {}) for result in scored]
        data |= {result.data[evaluation.key] for result in scored if evaluation.key in result.data}
    task = SOURCES[first].task
    defaults = defaults_of(task_settings(table.base, [task])[task])
    alike = not any(setting_difference(protocols[0], each, defaults) for each in protocols[1:])
    return alike and len(data) <= 1


def _recipe_remarks(table: TableLayout) -> list[str]:
    """Describe the recipe that the rows of a table of claims share."""
    if not table.makes_claims:
        return []
    base = table.base
    others = "".join(
        f"; of {t.name} {t.batch_size} at {t.student_resolution or base.resolution} px"
        for t in base.teachers
        if t.batch_size is not None
    )
    remark = (
        f"Every row, but for what its name and the command say: the demo's recipe (eq. 2 and 3 of AM-RADIO, "
        f"{base.optim.kind}) with {base.steps} steps of {base.batch_size} images at {base.resolution} px"
        f"{others}."
    )
    return [remark]


def _seeds_remarks(
    table: TableLayout, runs: Runs, found: Mapping[str, Sequence[RowResult]], results: Path
) -> list[str]:
    """Describe where intervals lack the error of seeds, and where a cell has fewer seeds than there are."""
    remarks = []
    students = [line for line in table.lines if line.run]
    if lone := [line.label for line in students if len(found[line.label]) == 1]:
        remarks.append(
            f"One seed: {', '.join(lone)}. Between two such lines, or beside a teacher, intervals and "
            f"verdicts are of the images alone; another seed may give the other order."
        )
    for line in students:
        for column in table.columns:
            count, of = len(_scores(table, line, found[line.label], column)), len(found[line.label])
            if 0 < count < of:
                remarks.append(f"{column_title(column, table)} of {line.label}: {count} of its {of} seeds.")
    wanted = {name for line in students for name in seeds_of(runs, line.run)}
    there = {
        path.stem
        for line in students
        for path in (results / f"{line.run}.json", *results.glob(f"{line.run}-seed*.json"))
        if path.is_file()
    }
    if others := sorted(there - wanted):
        remarks.append(f"Results of other seeds, left out (see --seeds): {', '.join(others)}.")
    return remarks


def _settings_remarks(table: TableLayout, runs: Runs, results: Path) -> list[str]:
    """Name the results that the command would not have made: of other settings, or another program."""
    others = [
        row.name
        for row in rows_of([(table, runs)])
        if (result := read_result(results, row.name)) is not None and not is_current(row, result)
    ]
    return [f"Made with other settings than this command's: {', '.join(others)}."] if others else []


def _data_remarks(table: TableLayout, found: Mapping[str, Sequence[RowResult]]) -> list[str]:
    """Name the user's data that the scores of a table at the paper's size are of."""
    if table.size == "small":
        return []
    seen: dict[str, dict[str, None]] = {}
    for line in table.lines:
        for evaluation in table.evaluations([line]):
            for result in found[line.label]:
                names = seen.setdefault(evaluation.key, {})
                names |= dict.fromkeys(result.data.get(evaluation.key, ()))
    return [f"Scored on, {key}: {'; '.join(names)}." for key, names in seen.items() if names]


def _agreements(table: TableLayout, cells: Mapping[str, Sequence[TableCell]]) -> list[str]:
    """Describe how the order of many students agrees with the paper's, in each column."""
    remarks = []
    for index, column in enumerate(table.columns):
        students = [cells[line.label][index] for line in table.lines if line.run]
        pairs = [(c.value, c.paper) for c in students if c.value is not None and c.paper is not None]
        if len(pairs) < _FEWEST:
            continue
        tau = rank_agreement([ours for ours, _ in pairs], [papers for _, papers in pairs])
        remarks.append(
            f"{column_title(column, table)}: Kendall's tau of our order of the {len(pairs)} students with "
            f"the paper's is {tau:+.2f}."
        )
    return remarks


def print_tables(made: MadeTables, console: Console) -> None:
    """Print the tables, with the paper's numbers beside ours where it has some, and the verdicts below.

    A table that is wider than the console is printed in parts of some columns each.
    """
    style = box.ROUNDED if console.is_terminal else box.ASCII
    unlimited = console.options.update(width=_WIDEST)
    for table in made.tables:
        left = list(range(len(table.columns)))
        while left:
            parts = (_grid(table, left[:count], style) for count in range(len(left), 0, -1))
            fits = (
                part for part in parts if Measurement.get(console, unlimited, part).maximum <= console.width
            )
            grid = next(fits, None) or _grid(table, left[:1], style)
            console.print(grid)
            left = left[len(grid.columns) - 2 :]
        if table.differences:
            verdicts = Table(box=style)
            numbers = _number_columns(table.claims)
            for index, title in enumerate(table.verdict_head):
                verdicts.add_column(title, justify="right" if index in numbers else "left")
            for row in (each.texts for each in table.differences):
                verdicts.add_row(*(Text(shown(cell)) for cell in row))
            console.print(verdicts)
        for remark in table.remarks:
            console.print(Text(shown(remark)), soft_wrap=True)


def _number_columns(claims: bool) -> tuple[int, ...]:
    """Return which columns of `MadeTable.verdict_head` have numbers; what is claimed is a word."""
    return (3, 4) if claims else (3, 4, 5)


def _grid(table: MadeTable, columns: Sequence[int], style: box.Box) -> Table:
    """Make a table of some columns for the console, after the models and their seeds."""
    grid = Table(title=Text(shown(f"{table.name}: {table.title}")), box=style)
    grid.add_column("model", overflow="fold")
    grid.add_column("seeds", justify="right")
    for column in columns:
        title = table.columns[column]
        grid.add_column(Text(title if table.claims else f"{title}\n(paper)"), justify="right")
    for line in table.lines:
        grid.add_row(Text(shown(line.label)), line.seeds, *(_both(line.cells[column]) for column in columns))
    return grid


def _both(cell: TableCell) -> str:
    paper = "" if cell.paper is None else f"({cell.paper:g})"
    return f"{cell.text} {paper}".strip()


def write_tables(made: MadeTables, path: Path) -> None:
    """Write the tables as a file that `radio-eval report --tables` reads; tables of others in it are kept.

    Raises:
        DataError: the file is there and is no such file.
    """
    kept = {table.name: table for table in read_tables(path).tables} if path.is_file() else {}
    kept |= {table.name: table for table in made.tables}
    order = sorted(kept, key=lambda name: (len(name), name))  # 10 after 2
    both = MadeTables(tables=tuple(kept[name] for name in order))
    write_text(path, json.dumps(to_plain(both), indent=1) + "\n")


def as_markdown(made: MadeTables, command: str) -> str:
    """Format the tables as a page: all of them the paper's, or all of claims.

    Args:
        made: the tables.
        command: that made them.
    """
    claims = any(table.claims for table in made.tables)
    parts = [(_OF_CLAIMS if claims else _INTRODUCTION).format(command=command)]
    for table in made.tables:
        parts.append(f"## {table.name.replace('table', 'Table ')}: {table.title}\n")
        labels = [(line.label,) if claims else (line.label, line.paper_label) for line in table.lines]
        rows = [
            [*label, line.seeds, *map(_both, line.cells)]
            for label, line in zip(labels, table.lines, strict=True)
        ]
        head = ["model", *([] if claims else ["the paper's"]), "seeds", *table.columns]
        parts.append(markdown_table(head, rows, range(1 if claims else 2, len(head))))
        if table.differences:
            texts = [each.texts for each in table.differences]
            parts.append(markdown_table(table.verdict_head, texts, _number_columns(claims)))
        parts += [f"- {remark}" for remark in table.remarks]
        parts += [""] if table.remarks else []
    return "\n".join(parts)


_INTRODUCTION = """\
# The paper's tables on the generated world
Made by `{command}`; do not edit. Tiny students and teachers on generated images: the scores are not the
paper's, the question is whether its orderings hold. Every score is our mean over seeds with half of a
95 % interval, and in brackets the paper's number on its own data (AM-RADIO, CVPR 2024).

Below each table, lines are compared: our difference with its 95 % interval over seeds (Welch's) and
images (a paired bootstrap; for VQA from both lines' own intervals), and the paper's. *holds*: the same
sign, and the interval excludes zero; *reversed*: the other sign, likewise; *as the paper* or *opposite,
within noise*: the same or the other sign, and the interval includes zero; *tie*: our difference is zero.
Each verdict stands alone: where there is no difference at all, one in twenty intervals excludes zero by
chance. The paper gives no intervals: its own gaps of a few hundredths may be noise.
"""

_OF_CLAIMS = """\
# What is claimed, measured on the generated world
Made by `{command}`; do not edit. Tiny students learn from tiny teachers on generated images: `clip`, `dense`
and `sam` play CLIP's, DINOv2's and SAM's part. Every score is our mean over seeds with half of a 95 %
interval, in percent:

- *unexplained*: the fraction of the variance of a teacher's tokens that the student's adaptor leaves
  unexplained: 0 for the teacher's own tokens, 100 for their mean everywhere, and more for what is worse;
- *angle*: the same of summaries, by squared angles from the teacher's mean direction;
- *largest - smallest*: over the teachers, from the worst explained to the best;
- *pattern reproduced*: how much of the pattern that the noisy teacher's tokens have more than the clean one's
  is in the student's too;
- *k-NN*, *zero-shot*: top-1 over 60 classes, ten shapes in six colours: chance is 1.7, and who tells only the
  colour has 10;
- *worst of best side*: the lowest score over the sides of the input, as a share of the highest. It says
  little of a student that hardly tells more than the colour at any side.

Below each table, lines are compared: our difference with its 95 % interval over seeds (Welch's) and images (a
paired bootstrap, or from both lines' own intervals), and what is claimed of it. *holds*: as claimed, and the
interval excludes zero; *reversed*: the other way, likewise; *as claimed* or *opposite, within noise*: the
interval includes zero. Where nothing is claimed, the verdict says what is seen. Each verdict stands alone:
where there is no difference at all, one in twenty intervals excludes zero by chance.
"""

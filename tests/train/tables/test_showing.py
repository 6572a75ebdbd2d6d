"""Tables collected from results: what is compared, and what a table says about seeds and settings."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evals.reporting.paper_tables import MadeTable, MadeTables, read_tables
from radio.config import to_plain
from train.tables import make_tables
from train.tables.layout import runs_of
from train.tables.making import protocols_of, rows_of
from train.tables.results import RowResult, Score, deciding_settings, write_result
from train.tables.showing import collect, print_tables, write_tables

(TABLE,) = make_tables("table2", "small")


def write_rows(folder: Path, values: dict[str, float], num_seeds: int = 1) -> dict[str, RowResult]:
    """Write a result with a k-NN for each of the rows named."""
    written = {}
    for row in rows_of([(TABLE, runs_of(TABLE, TABLE.base, num_seeds))]):
        if row.name in values:
            value = values[row.name]
            score = Score(value=value, low=value - 1, high=value + 1)
            result = RowResult(
                name=row.name,
                settings=deciding_settings(row.config),
                scores={"knn": {"top1": score}},
                protocols={key: to_plain(own) for key, own in protocols_of(row).items()},
            )
            write_result(folder, result)
            written[row.name] = result
    return written


def collected(folder: Path, num_seeds: int = 1) -> MadeTable:
    (table,) = collect([(TABLE, runs_of(TABLE, TABLE.base, num_seeds))], folder).tables
    return table


def test_a_table_of_one_seed_is_not_called_more(tmp_path: Path) -> None:
    write_rows(tmp_path, {"no-spatial": 40.0, "base": 50.0})
    table = collected(tmp_path)
    (found,) = table.differences
    assert (found.line, found.against, found.verdict) == ("both", "none", "holds")
    assert found.high == pytest.approx(10 + 2**0.5, abs=1e-4)
    (remark,) = table.remarks[len(TABLE.remarks) :]
    assert remark.startswith("One seed: none, both. ") and "of the images alone" in remark


def test_a_mean_over_fewer_seeds_than_the_line_has_is_told(tmp_path: Path) -> None:
    names = {f"base-seed{seed}": 50.0 + seed for seed in range(3)}
    written = write_rows(tmp_path, names, num_seeds=3)
    write_result(tmp_path, replace(written["base-seed2"], scores={}))
    table = collected(tmp_path, num_seeds=3)
    assert table.lines[3].seeds == "3"
    assert table.lines[3].cells[1].value == 50.5
    assert "k-NN of both: 2 of its 3 seeds." in table.remarks


def test_scores_by_settings_that_came_later_are_compared_where_they_are_the_defaults(tmp_path: Path) -> None:
    written = write_rows(tmp_path, {"no-spatial": 40.0, "base": 50.0})
    for name, changed in (("no-spatial", {}), ("base", {"k": [10, 20]})):
        old = {**written[name].protocols["knn"], **changed}
        del old["temperature"]  # as if it had been written before there was such a setting
        write_result(tmp_path, replace(written[name], protocols={"knn": old}))
        assert [found.verdict for found in collected(tmp_path).differences] == ([] if changed else ["holds"])


def test_a_wide_table_is_printed_in_parts_that_fit(tmp_path: Path) -> None:
    write_rows(tmp_path, {"base": 51.25})
    table = replace(collected(tmp_path), differences=(), remarks=())
    cells = tuple(replace(table.lines[3].cells[1], value=60.0 + number) for number in range(9))
    line = replace(table.lines[3], cells=cells)
    wide = replace(table, columns=tuple(f"task number {n}" for n in range(9)), lines=(line,), claims=True)
    printed = {}
    for width in (60, 200):
        console = Console(file=io.StringIO(), width=width)
        print_tables(MadeTables(tables=(wide,)), console)
        printed[width] = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, printed[width].splitlines())) <= width
        for number in range(9):
            assert printed[width].count(f"task number {number} ") == 1
            assert printed[width].count(f"{60 + number}.0") == 1
    assert printed[200].count("| both ") == 1 and printed[60].count("| both ") == 5


def test_results_of_other_seeds_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path, {"base": 50.0})
    table = collected(tmp_path, num_seeds=3)
    assert table.lines[3].seeds == "0 of 3"
    assert table.remarks[len(TABLE.remarks) :] == ("Results of other seeds, left out (see --seeds): base.",)
    write_rows(tmp_path, {f"base-seed{seed}": 50.0 for seed in range(3)}, num_seeds=3)
    seeds = "base-seed0, base-seed1, base-seed2"
    assert collected(tmp_path).remarks[-1] == f"Results of other seeds, left out (see --seeds): {seeds}."


def test_results_of_other_settings_are_named_and_other_protocols_not_compared(tmp_path: Path) -> None:
    written = write_rows(tmp_path, {"no-spatial": 40.0, "spatial-clip": 45.0, "base": 50.0})
    short = replace(written["no-spatial"], settings={**written["no-spatial"].settings, "steps": 3})
    write_result(tmp_path, short)
    table = collected(tmp_path)
    assert len(table.differences) == 2  # scored alike
    assert table.remarks[-1] == "Made with other settings than this command's: no-spatial."
    protocols = {**written["base"].protocols, "knn": {**written["base"].protocols["knn"], "k": [5]}}
    write_result(tmp_path, replace(written["base"], protocols=protocols))
    table = collected(tmp_path)
    assert [each.line for each in table.differences] == ["scenes:clip"]
    assert (
        "k-NN of both and none: scored by different settings or on different data, and not compared."
        in table.remarks
    )
    assert table.remarks[-1] == "Made with other settings than this command's: no-spatial, base."


def test_scores_on_other_data_are_not_compared(tmp_path: Path) -> None:
    written = write_rows(tmp_path, {"no-spatial": 40.0, "base": 50.0})
    for name, data in (("no-spatial", "val: 20 (00aa)"), ("base", "testdev: 20 (00bb)")):
        write_result(tmp_path, replace(written[name], data={"knn": (data,)}))
    table = collected(tmp_path)
    assert not table.differences
    assert "scored by different settings or on different data, and not compared." in " ".join(table.remarks)
    write_result(tmp_path, replace(written["base"], data={"knn": ("val: 20 (00aa)",)}))
    assert len(collected(tmp_path).differences) == 1


def test_losses_are_compared_over_seeds(tmp_path: Path) -> None:
    (table,) = make_tables("table5", "small")
    runs = runs_of(table, table.base, 2)
    losses = {"base": (0.10, 0.12), "mean": (0.05, 0.06)}
    for run, values in losses.items():
        for seed, value in enumerate(values):
            result = RowResult(name=f"{run}-seed{seed}", settings={}, values={"summary_loss": value})
            write_result(tmp_path, result)
    (made,) = collect([(table, runs)], tmp_path).tables
    (found,) = made.differences
    # Welch: the standard error of the means' difference times Student's quantile for 1.47 degrees, here of 1
    half = 12.7062 * ((0.0002 + 0.00005) / 2) ** 0.5
    assert (found.column, found.value, found.paper) == ("summary loss", -0.055, -0.02)
    assert (found.low, found.high) == pytest.approx((-0.055 - half, -0.055 + half), abs=1e-3)
    assert found.verdict == "as the paper, within noise"
    assert found.texts[3] == "-0.055"
    (alone,) = collect([(table, runs_of(table, table.base, 1))], tmp_path).tables
    assert not alone.differences  # of one seed's files there are none


def test_tables_of_any_name_are_kept_in_order(tmp_path: Path) -> None:
    def named(*names: str) -> MadeTables:
        return MadeTables(
            tables=tuple(MadeTable(name=name, title="", columns=(), lines=()) for name in names)
        )

    write_tables(named("mine", "table10"), tmp_path / "tables.json")
    write_tables(named("table2"), tmp_path / "tables.json")
    read = read_tables(tmp_path / "tables.json")
    assert [table.name for table in read.tables] == ["mine", "table2", "table10"]

"""A table's command: rows are trained, scored, kept, gone on with, collected, and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.core import evaluators
from evals.core.task import make_evaluator
from evals.reporting.paper_tables import read_tables
from radio import entry
from radio.config import read_yaml
from radio.errors import RadioError
from tests.train.conftest import read_records
from train.cli import _parse, main
from train.commands import train_all
from train.config import TrainConfig
from train.distributed import REQUEUE, Preemption
from train.tables import make_tables
from train.tables.commands import _change_table
from train.tables.making import protocols_of, rows_of
from train.tables.options import TableCommand
from train.tables.paper_size import DATA_SETS
from train.tables.results import read_result

TINY = [
    *("--teachers.0.model", "tiny:clip", "--teachers.1.model", "tiny:dense"),
    *("--resolution", "48", "--steps", "3", "--batch-size", "2", "--log-every", "1", "--device", "cpu"),
    *("--data.scenes", "50", "--data.workers", "0", "--seeds", "1"),
    *("--score", "knn", "--knn.scenes", "40", "20", "--knn.k", "3"),
]
ROWS = ("no-spatial", "spatial-clip", "spatial-dense", "base")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score in this process: others would take seconds to start."""
    monkeypatch.setattr("train.tables.making.num_workers", lambda *_: 1)


def make(name: str, tmp_path: Path, *words: str) -> int:
    return main([name, *TINY, "--out", str(tmp_path / "out"), *words])


@pytest.mark.usefixtures("one_process")
def test_one_command_makes_a_table_and_the_next_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    page = tmp_path / "tables.md"
    assert make("table2", tmp_path, "--page", str(page)) == 0
    said = capsys.readouterr().out
    assert "0 of 4 rows are done" in said and "row spatial-dense (3 of 4)" in said
    for row in ROWS:
        written = read_yaml(TrainConfig, tmp_path / "out" / row / "config.yaml")
        assert (written.steps, written.out.name) == (3, row)
        assert [record["step"] for record in read_records(tmp_path / "out" / row)] == [1, 2, 3]
    weights = [
        tuple(teacher.spatial_weight for teacher in read_yaml(TrainConfig, path).teachers)
        for path in (tmp_path / "out" / row / "config.yaml" for row in ROWS)
    ]
    assert weights == [(0, 0), (1, 0), (0, 1), (1, 1)]
    results = tmp_path / "out" / "results"
    (table,) = read_tables(results / "tables.json").tables
    assert table.columns == ("zero-shot", "k-NN", "probe")
    both = table.lines[3]
    result = read_result(results, "base")
    assert result is not None
    score = result.scores["knn"]["top1"]
    assert both.cells[1].value == pytest.approx(score.value)
    assert both.cells[1].paper == 82.96
    assert both.cells[0].value is None and both.cells[0].paper == 74.85  # not asked for
    assert sum(block[1][0] for block in score.blocks) == 20  # images
    report = json.loads((tmp_path / "out" / "base" / "reports" / "knn-base.json").read_text())
    assert report["metrics"]["top1"]["value"] == pytest.approx(score.value)
    assert [d.column for d in table.differences] == ["k-NN"] * 3
    assert {d.against for d in table.differences} == {"none"}
    text = page.read_text()
    assert f"| both | RADIO, spatial loss of both | 1 | (74.85) | {score.value:.1f} ±" in text
    assert "## Table 2: whose spatial features are matched" in text

    monkeypatch.setattr("train.commands.Trainer", None)  # nothing is trained again
    assert make("table2", tmp_path, "--page", str(page)) == 0
    assert "4 of 4 rows are done" in capsys.readouterr().out
    assert page.read_text() == text.replace("--page", "--page")
    assert make("table2", tmp_path, "--collect") == 0
    assert "rows are done" not in capsys.readouterr().out


@pytest.mark.usefixtures("one_process")
def test_rows_by_name_a_limit_of_time_and_a_second_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("table2", tmp_path, "--rows", "base", "--minutes", "0") == REQUEUE
    assert "the same command goes on with base" in capsys.readouterr().out
    assert not (tmp_path / "out" / "base").exists()
    assert make("table2", tmp_path, "--rows", "base") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"base", "results"}
    trained = (tmp_path / "out" / "base" / "ckpt.pt").stat().st_mtime_ns
    assert make("table2", tmp_path, "--rows", "base", "--knn.k", "5") == 0  # other settings: scored again
    result = read_result(tmp_path / "out" / "results", "base")
    assert result is not None and result.protocols["knn"]["k"] == [5]
    assert (tmp_path / "out" / "base" / "ckpt.pt").stat().st_mtime_ns == trained
    (tmp_path / "out" / "results" / "base.json").write_text("damaged")
    assert make("table2", tmp_path, "--rows", "base", "--restart") == 0  # it is not read
    assert read_result(tmp_path / "out" / "results", "base") is not None


@pytest.mark.usefixtures("one_process")
def test_a_signal_stops_the_table_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "agreed", lambda _: next(asked))
        assert make("table2", tmp_path, "--rows", "base", "no-spatial") == REQUEUE
    row = tmp_path / "out" / "no-spatial"
    assert f"stopped after step 2 of {row}; the same command goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "out" / "base").exists()
    assert make("table2", tmp_path, "--rows", "base", "no-spatial") == 0
    for name in ("base", "no-spatial"):
        assert [record["step"] for record in read_records(tmp_path / "out" / name)] == [1, 2, 3]


@pytest.mark.usefixtures("one_process")
def test_a_task_that_fails_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    broken = dataclasses.replace(make_evaluator("knn"), evaluate=lambda *_: 1 / 0)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setitem(evaluators._entries, "knn", lambda: broken)
        assert make("table2", tmp_path, "--rows", "base") == 1
    assert "not all of base could be made; the same command tries again" in capsys.readouterr().out
    assert make("table2", tmp_path, "--rows", "base") == 0


@pytest.mark.usefixtures("one_process")
def test_a_row_that_cannot_be_trained_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(runs: dict[str, TrainConfig], *given: Any, **named: Any) -> Any:
        if "no-spatial" in runs:
            raise RadioError("the loss is nan")
        return train_all(runs, *given, **named)

    monkeypatch.setattr("train.tables.commands.train_all", train)
    assert make("table2", tmp_path, "--rows", "no-spatial", "base") == 1
    said = capsys.readouterr().out
    assert "no-spatial: the loss is nan" in said and "not all of no-spatial could be made" in said
    assert {path.name for path in (tmp_path / "out" / "results").glob("[bn]*.json")} == {"base.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "bas"], "no row 'bas'; did you mean base"),
        (["--batch-size", "0"], "--batch-size: 0 is out of bounds"),
        (["--teachers.1.batch-size", "1"], "clip and dense see other images or sizes"),  # AMTML-KD's row
        (["--size", "paper"], "the paper's tables are scored on your data sets: give --data-root"),
        (["--seeds", "0"], "--seeds: 0 is out of bounds"),
        (["--balance.kind", "adaloss"], "table3 sets --balance.kind itself in row base, where the option"),
        (["--collect", "--plan"], "--collect and --plan do not go together"),
        (["--collect"], "results: no such folder, and nothing to collect"),
        (["--results", "/proc/nowhere"], "--results /proc/nowhere"),
        (["--page", "/proc/nowhere/tables.md"], "--page /proc/nowhere"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_row(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.train(["table3", *TINY, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_data_roots_commands_run_where_the_command_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("imagenet", "ade20k", "coco", "voc")
    named = "".join(f"{name}: {name}\n" for name in sets)
    (tmp_path / "data.yaml").write_text(f"{named}laion: 'pipe:touch {tmp_path}/ran'\n")
    words = ["table1", "--size", "paper", "--rows", "a-laion", "--data-root", str(tmp_path)]
    words += ["--out", str(tmp_path / "out")]
    said = f"laion would run the command 'touch {tmp_path}/ran'; where you trust it, add --allow-pipes"
    assert entry.train(words) == 2
    assert said in capsys.readouterr().err
    assert entry.train([*words, "--allow-pipes"]) == 2
    error = capsys.readouterr().err
    assert "would run" not in error and "no such file or folder" in error  # the next thing that is checked
    assert not (tmp_path / "ran").exists()


def test_options_change_settings_one_by_one_in_every_table() -> None:
    changed = ["--data.workers", "2", "--teachers.0.summary-weight", "0.5", "--vqa.image-tokens", "256"]
    default = make_tables("tables", "paper")[0].base
    tasks = ("knn", "vqa")
    command = _parse(
        TableCommand,
        TableCommand(config=replace(default, score=tasks)),
        ["--score", *tasks, *changed, "--rows", "a-laion", "vit-b14"],
        "tables",
    )
    for name, run, shards in (("table1", "a-laion", "laion"), ("table6", "vit-b14", "imagenet-21k")):
        (table,) = make_tables(name, "paper")
        config = _change_table(table, default, command)[1][run]
        assert config.data == replace(DATA_SETS[shards], workers=2)  # and its own images
        assert config.teachers[0] == replace(table.base.teachers[0], summary_weight=0.5)
        assert config.teachers[1] == table.base.teachers[1]
        assert config.tasks["vqa"].image_tokens == 256
        assert config.score == tasks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["table4", "--seg.crop", "120"],
            "table4 sets --seg.crop itself, and the option would change nothing",
        ),
        (
            ["table5", "--summary", "mean"],
            "with these options the rows base and mean are the same run; leave",
        ),
    ],
)
def test_options_that_would_do_nothing_or_make_rows_equal(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.train([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_options_reach_a_table_without_runs(tmp_path: Path) -> None:
    (table,) = make_tables("table10", "small")
    command = _parse(
        TableCommand,
        TableCommand(config=table.base),
        ["--score", "knn", "--knn.k", "5", "--out", str(tmp_path / "out")],
        "table10",
    )
    rows = rows_of([_change_table(table, table.base, command)])
    assert [[evaluation.key for evaluation in row.evaluations] for row in rows] == [["knn"]] * 3
    assert {row.config.out.parent for row in rows} == {tmp_path / "out"}
    assert protocols_of(rows[0])["knn"].k == (5,)


def test_a_damaged_file_of_tables_is_found_before_the_first_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "out" / "results"
    results.mkdir(parents=True)
    (results / "tables.json").write_text("hello")
    assert entry.train(["table3", *TINY, "--out", str(tmp_path / "out")]) == 2
    assert "tables.json: is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out" / "base").exists()


def test_an_unknown_name_may_have_been_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.train(["table33"]) == 2
    assert "unknown recipe 'table33'; did you mean table3" in capsys.readouterr().err
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("table1", "table11", "tables"))


def lines_of(said: str) -> dict[str, list[str]]:
    """Cells by the first one; of lines that begin alike, the first."""
    lines = [line.split("|")[1:-1] for line in said.splitlines() if line.count("|") > 4]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in reversed(lines)}


def test_the_plan_sums_the_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = ["table4", "--plan", "--seeds", "1", "--steps", "864000", "--price-per-gpu-hour", "2.5"]
    assert main([*words, "--peak-tflops", "0.01"]) == 0
    rows = lines_of(capsys.readouterr().out)
    days = {name: float(rows[name][5].replace(",", "")) for name in ("no-cpe", "base")}
    total = rows["all, one after another"]
    assert float(total[5].replace(",", "")) == pytest.approx(sum(days.values()), rel=0.01)
    hours, price = (float(total[i].replace(",", "")) for i in (6, 7))
    assert hours == pytest.approx(24 * sum(days.values()), rel=0.01)
    assert price == pytest.approx(2.5 * hours, rel=0.01)


def test_a_rehearsal_tries_every_row_without_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["table4", "--rehearse", "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    rows = lines_of(capsys.readouterr().out)
    assert rows["no-cpe"][0] == "vit-tiny12"
    assert rows["no-cpe"][1].startswith("24 images, 1 rank,")
    assert rows["no-cpe"][3] == "knn 96, seg-crop-216 216"
    assert rows["scenes:dense"][3] == "knn 108, seg-crop-216 216"
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_finds_what_would_fail_on_the_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["table4", "--rehearse", "--seeds", "1", "--resolution", "100"]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and "cannot take 100x100 px" in said


def test_data_of_teachers_that_are_not_there_are_an_error_before_the_first_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    words = ["table10", "--out", str(tmp_path / "out"), "--score", "knn", "--device", "cpu"]
    with pytest.raises(RadioError, match=r"knn: .*absent: no such file or folder; mend the task's settings"):
        main([*words, "--knn.bank", absent, "--knn.query", absent])
    assert "row scenes:clip" not in capsys.readouterr().out

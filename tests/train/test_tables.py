"""Tables of the paper made again: every row a run of its own, told apart, resumed, and scored together."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.core.paper import TABLE_3
from radio import entry
from radio.config import read_yaml, to_plain, write_yaml
from radio.students import students
from train import scoring
from train.assembly import check_settings
from train.cli import main
from train.config import TrainConfig
from train.preempt import REQUEUE, Preemption
from train.recipes import recipes
from train.tables import rows_of, tables
from train.trainer import Trainer

from .conftest import read_records

TINY = [
    *("--teachers.0.model", "tiny:clip", "--teachers.1.model", "tiny:dense"),
    *("--resolution", "48", "--steps", "3", "--batch-size", "2", "--log-every", "1", "--device", "cpu"),
    *("--data.scenes", "50", "--data.workers", "0"),
]
ROWS = {"naive": "naive", "uncertainty": "uncertainty", "adaloss": "adaloss", "amtml-kd": "amtml"}


@pytest.mark.parametrize("name", list(tables))
def test_every_row_of_every_table(name: str, tmp_path: Path) -> None:
    table = tables[name]()
    assert (tables[name].__doc__ or "").strip()
    rows = rows_of(table, table.base)
    for config in rows.values():
        check_settings(config, 1)
        write_yaml(config, tmp_path / "config.yaml")
        assert read_yaml(TrainConfig, tmp_path / "config.yaml") == config
        assert config.student in students
        assert config.out.parent == table.base.out
    assert len({config.out for config in rows.values()}) == len(rows)
    alike = {json.dumps(to_plain(replace(row, recipe="", out=Path()))) for row in rows.values()}
    assert len(alike) == len(rows)  # no two are the same run


@pytest.mark.parametrize("name", ["table3", "table3-paper"])
def test_table_3_has_the_four_balancers_on_clip_and_dinov2(name: str) -> None:
    table = tables[name]()
    rows = rows_of(table, table.base)
    assert {row: config.balance.kind for row, config in rows.items()} == ROWS
    for config in rows.values():
        assert config.teachers == table.base.teachers
        assert len(config.teachers) == 2
    if name == "table3-paper":
        assert rows["naive"].student == recipes["paper-b14"]().student == "vit-b14"


def test_one_command_trains_scores_and_shows_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(scoring, "score", lambda *arguments: asked.append(arguments))
    out = tmp_path / "table"
    assert main(["table3", *TINY, "--score", "knn", "--out", str(out)]) == 0
    for row, kind in ROWS.items():
        written = read_yaml(TrainConfig, out / row / "config.yaml")
        assert (written.balance.kind, written.out, written.steps) == (kind, out / row, 3)
        assert [record["step"] for record in read_records(out / row)] == [1, 2, 3]
    [(config, students, reports, _, paper)] = asked
    assert config.score == ("knn",)
    assert students == {row: out / row / "ckpt.pt" for row in ROWS}
    assert (reports, paper) == (out / "reports", TABLE_3)
    assert (out / "weights.svg").is_file()
    shown = {line.split(",")[0] for line in (out / "weights.csv").read_text().splitlines()[1:]}
    assert shown == set(ROWS) - {"naive"}
    said = capsys.readouterr().out
    assert "table3 adaloss 3/3  loss " in said
    assert "amtml-kd: clip summary" in said


def test_rows_are_chosen_kept_and_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students: list[Mapping[str, Path]] = []
    monkeypatch.setattr(scoring, "score", lambda _, scored, *__: students.append(scored))
    words = ["table3", *TINY, "--out", str(tmp_path), "--rows", "adaloss", "naive"]
    times = []
    for options in ([], [], ["--restart"]):
        assert main([*words, *options]) == 0
        times.append([(tmp_path / row / "metrics.jsonl").stat().st_mtime_ns for row in ("naive", "adaloss")])
        assert len(read_records(tmp_path / "naive")) == 3
    assert times[0] == times[1]
    assert all(again > before for before, again in zip(times[1], times[2], strict=True))
    assert [list(scored) for scored in students] == [["naive", "adaloss"]] * 3  # in the table's order
    assert not (tmp_path / "uncertainty").exists()


def test_a_row_is_forgotten_before_the_next_one_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two large students and their optimisers need not fit into the memory at once."""
    built: list[weakref.ref[Trainer]] = []

    def build(*arguments: Any, **options: Any) -> Trainer:
        assert [earlier() for earlier in built] == [None] * len(built)
        run = Trainer(*arguments, **options)
        built.append(weakref.ref(run))
        return run

    monkeypatch.setattr("train.tables.Trainer", build)
    assert main(["table3", *TINY, "--score", "--out", str(tmp_path)]) == 0
    assert len(built) == len(ROWS)


def test_a_signal_stops_the_table_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["table3", *TINY, "--out", str(tmp_path), "--rows", "naive", "adaloss", "--score"]
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "agreed", lambda _: next(asked))
        assert main(words) == REQUEUE
    assert (
        f"stopped after step 2 of {tmp_path / 'naive'}; the same command goes on from there"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "adaloss").exists()
    assert main(words) == 0
    for row in ("naive", "adaloss"):
        assert [record["step"] for record in read_records(tmp_path / row)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "adalos"], "the table has no row 'adalos'; did you mean adaloss"),
        (["--balance.kind", "adaloss"], "the rows of table 3 are the balancers; leave --balance out"),
        (["--batch-size", "0"], "--batch-size: 0 is out of bounds"),
        (["--teachers.1.batch-size", "1"], "clip and dense see other images or sizes"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_row(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.train(["table3", *TINY, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_name_may_have_been_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.train(["table33"]) == 2
    assert "unknown recipe 'table33'; did you mean table3" in capsys.readouterr().err
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in tables)


def test_the_plan_of_a_table_is_that_of_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table3", "--plan", "--student", "vit-tiny12"]) == 0
    said = capsys.readouterr().out
    assert all(f"table3 {row}: vit-tiny12 on " in said for row in ROWS)

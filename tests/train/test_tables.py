"""Tables of the paper made again: every row a run of its own, resumed, scored together and shown."""

from __future__ import annotations

import csv
import gc
import io
import json
import sys
import weakref
import xml.etree.ElementTree as Xml
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evals.core.paper import TABLE_3
from evals.core.report import read
from radio import entry
from radio.config import read_yaml, to_plain, write_yaml
from radio.dist import Ranks
from radio.errors import ConfigError, MissingExtraError, SizeError
from radio.students import TABLE_6, resolve_options, students
from tests.train.conftest import read_records
from train import scoring
from train.cli import main
from train.config import DataConfig, TrainConfig
from train.distributed import REQUEUE, Preemption
from train.recipes import recipes
from train.setup import check_settings
from train.tables import STUDENTS, WeightCurve, as_csv, as_svg, read_weights, rows_of, show_weights, tables
from train.trainer import Trainer

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
        own = replace(config, options=resolve_options(config.student, config.options))
        assert read_yaml(TrainConfig, tmp_path / "config.yaml") == own
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
    monkeypatch.setattr(scoring, "score", lambda *arguments, **_: asked.append(arguments))
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
    monkeypatch.setattr(scoring, "score", lambda _, scored, *__, **___: students.append(scored))
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

    monkeypatch.setattr("train.commands.Trainer", build)
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


def written(folder: Path, *records: dict[str, float]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def logged_runs(tmp_path: Path) -> dict[str, Path]:
    """A run with fixed weights, and one whose weight for clip goes from 0.5 to 1."""
    steps = range(10, 100, 10)
    moving = [
        {
            "step": step,
            "loss": 1.0,
            "clip/summary_weight": 0.5 + step / 180,
            "dense/summary_weight": 0.5 - step / 180,
        }
        for step in steps
    ]
    return {
        "naive": written(tmp_path / "naive", *({"step": step, "clip/summary": 0.1} for step in steps)),
        "amtml-kd": written(tmp_path / "amtml-kd", *moving),
    }


def test_the_log_gives_the_curves(logged_runs: dict[str, Path]) -> None:
    assert read_weights("naive", logged_runs["naive"]) == []
    clip, dense = read_weights("amtml-kd", logged_runs["amtml-kd"])
    assert (clip.run, clip.teacher, clip.kind) == ("amtml-kd", "clip", "summary")
    assert clip.steps == tuple(range(10, 100, 10))
    assert clip.weights[-1] == 1.0
    assert [a + b for a, b in zip(clip.weights, dense.weights, strict=True)] == pytest.approx([1.0] * 9)


def test_a_teacher_may_come_late(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "run", {"step": 1, "a/spatial_weight": 1.0}, {"step": 2, "b/c/spatial_weight": 2.0}
    )
    assert read_weights("run", folder) == [
        WeightCurve("run", "a", "spatial", (1,), (1.0,)),
        WeightCurve("run", "b/c", "spatial", (2,), (2.0,)),
    ]


def test_the_csv_reads_back(logged_runs: dict[str, Path]) -> None:
    curves = read_weights("amtml-kd", logged_runs["amtml-kd"])
    rows = list(csv.DictReader(io.StringIO(as_csv(curves))))
    assert len(rows) == 18
    assert rows[8] == {"run": "amtml-kd", "teacher": "clip", "loss": "summary", "step": "90", "weight": "1"}


def test_the_figure_is_one_and_the_same_svg_with_every_curve(logged_runs: dict[str, Path]) -> None:
    curves = read_weights("amtml-kd", logged_runs["amtml-kd"])
    other = [curve._replace(run="adaloss", kind="spatial") for curve in curves]
    drawn = as_svg([*other, *curves])
    assert drawn == as_svg([*other, *curves])
    root = Xml.fromstring(drawn)
    texts = [text for element in root.iter("{http://www.w3.org/2000/svg}text") if (text := element.text)]
    for text in (
        "adaloss",
        "amtml-kd",
        "clip summary",
        "dense summary",
        "clip spatial",
        "weight of the loss",
    ):
        assert texts.count(text) == 1
    assert texts.count("step") == 2


def test_five_steps_are_printed_and_the_files_named(logged_runs: dict[str, Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    show_weights(logged_runs, tmp_path, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    head = next(line for line in said.splitlines() if "weight at step" in line)
    assert head.replace("|", " ").split()[3:] == ["10", "30", "50", "70", "90"]
    line = next(line for line in said.splitlines() if "amtml-kd: clip summary" in line)
    assert line.replace("|", " ").split()[3:] == ["0.556", "0.667", "0.778", "0.889", "1.000"]
    assert "naive" not in said
    assert str(tmp_path / "weights.svg") in said
    assert (tmp_path / "weights.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "weights.csv").read_text().startswith("run,teacher,loss,step,weight\n")


def test_fixed_weights_alone_show_nothing(logged_runs: dict[str, Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    show_weights({"naive": logged_runs["naive"]}, tmp_path, console)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
    assert not (tmp_path / "weights.csv").exists()


def test_without_matplotlib_the_csv_is_there_and_the_extra_is_named(
    logged_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"am-radio\[report\]"):
        show_weights(logged_runs, tmp_path, Console(file=io.StringIO()))
    assert (tmp_path / "weights.csv").is_file()


def rows_of_table6(name: str = "table6", **changes: Any) -> dict[str, TrainConfig]:
    table = tables[name]()
    return rows_of(table, replace(table.base, **changes))


def test_one_student_or_all_each_in_a_folder_of_its_own() -> None:
    runs = rows_of_table6()
    assert list(runs) == [run.student for run in runs.values()] == list(STUDENTS)
    assert {f"timm:{name}" for name in TABLE_6} | {"e-radio-b", "e-radio-b-noup", "e-radio-l"} < set(STUDENTS)
    assert len({run.out for run in runs.values()}) == len(runs) == 15
    (one,) = rows_of_table6(student="timm:resnetv2_101").values()
    assert one.out == Path("runs/table6/timm-resnetv2_101")
    assert one == runs["timm:resnetv2_101"]
    with pytest.raises(ConfigError, match="unknown student 'e-radio-q'"):
        rows_of_table6(student="e-radio-q")


def test_students_are_trained_at_the_nearest_size_that_they_take() -> None:
    sides = {name: run.resolution for name, run in rows_of_table6().items()}
    assert sides["e-radio-b"] == 128  # windows of 4 at a stride of 32
    assert sides["vit-b14"] == 98
    assert {sides[f"timm:{name}"] for name in TABLE_6} == {96}
    assert {run.resolution for run in rows_of_table6("table6-paper").values()} == {224}


def test_the_papers_settings() -> None:
    config = tables["table6-paper"]().base
    assert (config.batch_size, config.steps, config.resolution) == (4096, 600_000, 224)
    assert [teacher.model.partition("@")[0] for teacher in config.teachers] == [
        "openclip:ViT-H-14",
        "dinov2:vitg14",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_five_steps_give_every_parameter_a_finite_gradient_and_a_checkpoint_that_is_scored(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(scenes=20, workers=0)
    small = rows_of_table6(student=student, steps=5, batch_size=2, resolution=64, data=data, device="cpu")
    (config,) = small.values()
    run = Trainer(config, Ranks(), torch.device("cpu"), Console(quiet=True))
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    path = run.train()
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(not torch.equal(parameter, before[name]) for name, parameter in run.model.named_parameters())
    scored = ["knn", str(path), "--scenes", "12", "8", "--k", "3", "--out", "reports", "--plain"]
    assert entry.evaluate(scored) == 0
    report = read(Path("reports") / f"knn-{config.out.name}.json")
    assert report.metadata["model"]["student"] == student
    assert 0 <= report.metrics["top1"].value <= 100
    del run, before, name, parameter
    gc.collect()  # gigabytes, and the next student is as large


def test_a_size_that_its_stride_does_not_divide_is_an_error(tmp_path: Path) -> None:
    (config,) = rows_of_table6(student="timm:regnety_064", resolution=100).values()
    with pytest.raises(SizeError, match=r"cannot be built for 100 px: its stride of 32 .* nearest is 96"):
        Trainer(replace(config, out=tmp_path), Ranks(), torch.device("cpu"), Console(quiet=True))


def test_the_command_trains_a_row_and_puts_it_beside_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("train.tables.STUDENTS", ("timm:test_resnet", "timm:test_vit"))
    monkeypatch.setattr("train.tables.SPEED", {"window_seconds": 0.0, "warmup_seconds": 0.0, "batches": (2,)})
    arguments = ["table6", "--steps", "2", "--batch-size", "2", "--resolution", "64", "--device", "cpu"]
    arguments += ["--knn.scenes", "40", "20", "--zeroshot.scenes", "20"]
    assert entry.train([*arguments, "--data.scenes", "20", "--data.workers", "0"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.count("|") > 6}
    report = read(Path("runs/table6/reports/knn-timm-test_resnet.json"))
    assert f"{report.metrics['top1'].value:.1f}" in lines["timm:test_resnet"][2]
    assert float(lines["timm:test_vit"][4]) > 0
    assert Path("runs/table6/reports/quality-against-speed.svg").is_file()
    assert {path.name for path in Path("runs/table6").iterdir()} == {
        "timm-test_resnet",
        "timm-test_vit",
        "reports",
    }

"""The command: architectures, checkpoints and teachers in one table, and the plot."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest

from evals.cli import main
from evals.core.paper import TABLE_6_MODELS
from evals.core.report import read
from evals.throughput.evaluator import COLUMNS, load_entry, speed_rows
from radio.errors import ConfigError, SizeError
from radio.model import ModelConfig, build
from radio.students import students

SHORT = [
    *("--batches", "1", "--repeat-seconds", "0", "--warmup-seconds", "0", "--device", "cpu", "--plain"),
    *("--threads", "1"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "first" / "ckpt.pt"
    build(ModelConfig(student="vit-tiny12"), seed=1).save(path)
    return path


def test_models_of_every_kind_in_one_table(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = [str(checkpoint), "timm:test_resnet", "arch:vit-tiny12", "scenes:dense"]
    assert main(["throughput", *specs, "--reference", "vit-tiny12", *SHORT]) == 0
    names = ("first", "timm-test_resnet", "vit-tiny12", "scenes-dense")
    assert {path.name for path in Path("reports").iterdir()} == {f"throughput-{name}.json" for name in names}
    out = capsys.readouterr().out
    lines = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.count("|") > 5}
    assert lines["timm:test_resnet 160x160 px"][2].strip() == "0.4"  # million parameters
    assert lines["vit-tiny12 96x96 px"][7].strip() == "1.00"
    assert "float32 on cpu" in out and "1 threads" in out and "to vit-tiny12" in out
    assert read(Path("reports/throughput-first.json")).notes == ()
    assert "untrained weights" in read(Path("reports/throughput-vit-tiny12.json")).notes[0]


def test_checkpoints_and_architectures_have_the_same_name_in_the_papers_table(tmp_path: Path) -> None:
    entry = load_entry("arch:timm:test_vit", 32)
    assert (entry.name, entry.paper_name, entry.untrained) == ("timm:test_vit", "timm:test_vit", True)
    assert entry.model.native_size == (32, 32)
    path = tmp_path / "runs" / "second" / "ckpt.pt"
    build(ModelConfig(student="timm:test_vit"), seed=1).save(path)
    assert load_entry(str(path)).paper_name == "timm:test_vit"
    assert load_entry("scenes:clip").paper_name == "scenes:clip"


def test_table_6_adds_every_architecture_of_the_paper(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {name for name in TABLE_6_MODELS if name not in students} == {"dinov2:vitg14", "openclip:ViT-H-14"}
    few = {
        "timm:regnety_064": students["timm:regnety_064"],
        "timm:resnetv2_101": students["timm:resnetv2_101"],
    }
    monkeypatch.setattr(students, "_entries", few)
    monkeypatch.setattr(students, "_declared", {})
    monkeypatch.setattr(students, "_families", {})
    assert main(["throughput", "--table6", "--resolution", "32", *SHORT]) == 0
    (resnet,) = speed_rows(read(Path("reports/throughput-timm-resnetv2_101.json")))
    (regnet,) = speed_rows(read(Path("reports/throughput-timm-regnety_064.json")))
    assert dict(zip(COLUMNS, regnet, strict=True))["paper_ratio"] == pytest.approx(6573 / 7283)
    assert dict(zip(COLUMNS, resnet, strict=True))["paper_ratio"] == 1.0
    assert "32x32 px" in capsys.readouterr().out


def test_windows_are_measured_side_by_side() -> None:
    assert main(["throughput", "vitdet-tiny12", "--window", "2", "global", *SHORT]) == 0
    for window in ("2", "-global"):
        report = read(Path(f"reports/throughput-vitdet-tiny12-window{window}.json"))
        measured = ["vitdet-tiny12-window2", "vitdet-tiny12-window-global"]
        assert report.settings["resolved"]["measured_together"] == measured
    with pytest.raises(SizeError, match="e-radio-tiny has no global attention to choose"):
        main(["throughput", "e-radio-tiny", "--window", "global", *SHORT])


def test_quality_is_drawn_against_speed_where_both_reports_are(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["throughput", str(checkpoint), *SHORT])
    assert not Path("reports/quality-against-speed.svg").exists()
    main(["knn", str(checkpoint), "--scenes", "60", "60", "--k", "5", "--plain", "--out", "reports"])
    main(["throughput", str(checkpoint), *SHORT])
    assert "reports/quality-against-speed.svg" in capsys.readouterr().out
    svg = Xml.parse("reports/quality-against-speed.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"first", "images a second", "k-NN top1 (%)"} <= texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model was named; give an architecture"),
        (["vit-tiny12", "vit-tiny12"], "vit-tiny12 was named twice"),
        (["vit-tiny12", "--reference", "vit-tiny16"], "'vit-tiny16' is none of the models"),
        (["timm:resnetv2_1O1"], "no model 'resnetv2_1O1'; did you mean resnetv2_101"),
    ],
)
def test_what_cannot_be_measured_is_an_error(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        main(["throughput", *arguments, *SHORT])


def test_all_leaves_it_out_unless_it_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = [
        "--throughput.batches",
        "1",
        "--throughput.repeat-seconds",
        "0",
        "--throughput.warmup-seconds",
        "0",
    ]
    assert main(["list"]) == 0
    assert "throughput   Images per second" in capsys.readouterr().out
    assert main(["all", str(checkpoint), "--tasks", "throughput", "--out", "o", *speed]) == 0
    assert (Path("o") / "throughput-first.json").is_file()

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evals.core.blocks import Table
from evals.core.report import DatasetInfo, Metric, Report, Skipped, file_name, read, schema, write
from evals.core.stats import proportion, wilson
from evals.tables import comparison
from radio.errors import DataError

REPORT = Report(
    task="knn",
    model="student",
    fingerprint="ab" * 32,
    primary_metric="top1",
    metrics={"top1": Metric(value=61.5, low=60.0, high=63.0), "few": Metric(value=40.0, std=1.25)},
    settings={"k": [10, 20], "bank": None, "resolved": {"size": [96, 96]}},
    data=(
        DatasetInfo(
            role="bank",
            name="scenes:train",
            fingerprint="cd" * 32,
            count=10,
            num_classes=3,
            skipped=(Skipped(key="a/ü.jpg", reason="truncated"),),
        ),
    ),
    device="cpu",
    seconds={"total": 1.5},
    created="2026-01-01T00:00:00+00:00",
    versions={"torch": "2"},
    notes=("in-domain",),
    blocks=(Table(title="classes", columns=("class", "top1"), rows=(("red ring", 50.0), ("absent", None))),),
)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    write(REPORT, tmp_path / "new" / "knn.json")
    assert read(tmp_path / "new" / "knn.json") == REPORT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["knn.json"]


@pytest.mark.parametrize("change", [("61.5", "71.5"), ("scenes:train", "scenes:trian"), ("truncated", "")])
def test_an_altered_report_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    path = tmp_path / "knn.json"
    write(REPORT, path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DataError, match="does not match its sha256"):
        read(path)


def test_files_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "knn.json"
    with pytest.raises(DataError, match="no such report"):
        read(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read(path)
    for text in ("[]", '{"format": "other"}', "3"):
        path.write_text(text)
        with pytest.raises(DataError, match="not a report of the format"):
            read(path)
    write(REPORT, path)
    data = json.loads(path.read_text())
    data["metrics"]["top1"]["value"] = "high"
    path.write_text(json.dumps(data))
    with pytest.raises(
        DataError, match=r"metrics\.top1\.value: input should be a valid number, got \'high\'"
    ):
        read(path)
    write(REPORT, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra": 1}))
    with pytest.raises(DataError, match="extra"):
        read(path)


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    bad = replace(REPORT, metrics={"top1": Metric(value=math.nan)})
    with pytest.raises(DataError, match="top1 is nan; nothing is written"):
        write(bad, tmp_path / "knn.json")
    with pytest.raises(DataError, match="primary metric 'top9' is not among"):
        write(replace(REPORT, primary_metric="top9"), tmp_path / "knn.json")
    assert not (tmp_path / "knn.json").exists()


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # R. G. Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_proportions_stay_inside_zero_and_a_hundred() -> None:
    assert proportion(0, 5).low == 0
    assert proportion(5, 5).high == 100
    with pytest.raises(DataError, match="at least one trial"):
        proportion(0, 0)


@pytest.mark.parametrize(
    ("model", "name"),
    [("pip:efficientnet-lite0", "knn-pip-efficientnet-lite0"), ("../x y", "knn-x-y"), ("", "knn-model")],
)
def test_file_names_are_safe(model: str, name: str) -> None:
    assert file_name("knn", model) == name


def test_the_comparison_shows_every_model_beside_the_others() -> None:
    other = replace(REPORT, model="teacher", metrics={"top1": Metric(value=70.0, low=69.0, high=71.0)})
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(comparison([REPORT, other], plain=True))
    console.file.close()
    text = console.export_text()
    row = next(line for line in text.splitlines() if "top1" in line)
    assert "61.5 ±1.5" in row
    assert "70.0 ±1.0" in row
    assert "40.0 (1.2)" in text
    with pytest.raises(DataError, match="one task's"):
        comparison([REPORT, replace(REPORT, task="seg")])


def test_the_schema_in_the_docs_is_the_one_that_reports_are_checked_with() -> None:
    page = Path(__file__).parents[3] / "docs" / "report.schema.json"
    assert json.loads(page.read_text()) == schema()


def test_values_that_the_schema_does_not_know_are_not_written(tmp_path: Path) -> None:
    report = replace(REPORT, notes=(7,))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^notes\[0\]: .*valid string, got 7"):
        write(report, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()

from __future__ import annotations

import json
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.core.evaluator import RunSettings, compared_settings, evaluators, machine_settings
from evals.core.report import DatasetInfo, Metric, Report, write
from evals.core.stats import proportion
from evals.reporting.command import junit, markdown, terminal_table
from evals.reporting.compare import Change, compare, read_reports, regressions
from evals.reporting.leaderboard import Column
from evals.resolution import ResolutionSettings
from radio.errors import DataError

QUERIES = 200


def make_report(task: str = "knn", model: str = "demo", **changes: Any) -> Report:
    values: dict[str, Any] = {
        "fingerprint": "f",
        "primary_metric": "top1",
        "metrics": {"top1": proportion(120, QUERIES), "mean_class": Metric(value=60.0)},
        "settings": {"k": [20], "batch": 64, "resolved": {"ranks": 1}},
        "data": (DatasetInfo(role="query", name="d", fingerprint="a" * 64, count=QUERIES, num_classes=2),),
        "device": "cpu",
        "seconds": {"total": 1.0},
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "files": (f"{task}-{model}.jsonl",),
        "records": f"{task}-{model}.jsonl",
        "machine_settings": ("batch",),
    }
    return Report(task=task, model=model, **{**values, **changes})


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a report, with records of which so many are right, the same ones first."""

    def save(folder: str, report: Report, right: int | None = None) -> Path:
        if right is not None:
            report = replace(report, metrics={**report.metrics, "top1": proportion(right, QUERIES)})
            lines = [{"id": f"{number}.png", "score": int(number < right)} for number in range(QUERIES)]
            path = tmp_path / folder / report.files[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write(report, tmp_path / folder / f"{report.task}-{report.model}.json")
        return tmp_path / folder

    return save


def verdicts(changes: list[Change]) -> dict[str, str]:
    return {f"{change.task} {change.metric}": change.verdict for change in changes}


def test_a_folder_against_itself_is_the_same(save: Callable[..., Path]) -> None:
    folder = save("a", make_report(), 120)
    changes = compare(read_reports(folder), read_reports(folder), tolerance=0.0)
    assert verdicts(changes) == {"knn top1": "same", "knn mean_class": "same"}
    assert (changes[0].low, changes[0].high, changes[0].paired) == (0.0, 0.0, True)
    assert regressions(changes) == []


@pytest.mark.parametrize(
    ("right", "noise", "verdict"),
    [(119, 0.0, "same"), (118, 0.0, "worse"), (118, 1.2, "same"), (117, 1.2, "worse"), (122, 0.0, "better")],
)
def test_a_drop_past_tolerance_and_noise_is_a_regression(
    save: Callable[..., Path], right: int, noise: float, verdict: str
) -> None:
    """One of 200 is half a point, the tolerance."""
    new, old = save("new", make_report(), right), save("old", make_report(), 120)
    changes = compare(read_reports(new), read_reports(old), tolerance=0.5, noise={"knn": {"top1": noise}})
    assert changes[0].difference == pytest.approx((right - 120) / 2)
    assert changes[0].verdict == verdict
    assert bool(regressions(changes)) == (verdict == "worse")


def test_the_paired_interval_is_that_of_the_differences(save: Callable[..., Path]) -> None:
    """20 of 200 queries were lost, none won: far narrower than two independent accuracies."""
    new, old = save("new", make_report(), 100), save("old", make_report(), 120)
    change = compare(read_reports(new), read_reports(old), tolerance=0.5)[0]
    half = 196 * np.sqrt(0.1 * 0.9 / QUERIES)
    assert change.low == pytest.approx(-10 - half, abs=0.7)
    assert change.high == pytest.approx(-10 + half, abs=0.7)


def test_without_records_the_intervals_are_added(save: Callable[..., Path]) -> None:
    new = save("new", make_report(files=(), records="", metrics={"top1": Metric(value=50, low=47, high=53)}))
    old = save("old", make_report(files=(), records="", metrics={"top1": Metric(value=60, low=56, high=64)}))
    change = compare(read_reports(new), read_reports(old), tolerance=0.5)[0]
    assert (change.low, change.high, change.paired) == (-15.0, -5.0, False)


def test_lower_can_be_better_and_rates_are_not_judged(save: Callable[..., Path]) -> None:
    metrics = {
        "top1": Metric(value=50),
        "loss": Metric(value=1.0, higher_is_better=False, unit="nats"),
        "encoder_rate": Metric(value=100.0, unit="images/s"),
    }
    slower = {
        **metrics,
        "loss": replace(metrics["loss"], value=2.0),
        "encoder_rate": replace(metrics["encoder_rate"], value=1.0),
    }
    new, old = save("new", make_report(metrics=slower)), save("old", make_report(metrics=metrics))
    changes = compare(read_reports(new), read_reports(old), tolerance=0.5)
    assert verdicts(changes) == {"knn top1": "same", "knn loss": "worse", "knn encoder_rate": "timing"}


def test_a_metric_of_which_neither_is_better_is_not_judged(save: Callable[..., Path]) -> None:
    def maps(value: float) -> Report:
        metric = Metric(value=value, higher_is_better=None)
        return make_report("maps", primary_metric="explained", metrics={"explained": metric}, records="")

    new, old = save("new", maps(50.0)), save("old", maps(90.0))
    changes = compare(read_reports(new), read_reports(old), tolerance=0.5)
    assert verdicts(changes) == {"maps explained": "changed"} and not regressions(changes)
    assert verdicts(compare(read_reports(old), read_reports(old), tolerance=0)) == {"maps explained": "same"}


def test_pairs_by_task_alone_where_that_is_clear(save: Callable[..., Path]) -> None:
    new, old = save("new", make_report(model="tonight"), 120), save("old", make_report(model="demo"), 120)
    assert verdicts(compare(read_reports(new), read_reports(old), tolerance=0)) == {
        "knn top1": "same",
        "knn mean_class": "same",
    }
    save("new", make_report(model="demo"), 100)
    save("old", make_report(task="seg", files=()))
    found = compare(read_reports(new), read_reports(old), tolerance=0.5)
    assert [(c.model, c.metric, c.verdict) for c in found] == [
        ("demo", "top1", "worse"),
        ("demo", "mean_class", "same"),
        ("tonight", "top1", "new"),
        ("demo", "top1", "missing"),
    ]
    assert [c.verdict for c in regressions(found)] == ["worse", "missing"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"k": [10], "batch": 64}}, r"k is \[10\] in the one and \[20\] in the other"),
        (
            {"data": (DatasetInfo(role="query", name="e", fingerprint="b" * 64, count=5, num_classes=2),)},
            r'query data is "e \(5, bbbbbbbbbbbb\)" in the one and "d \(200, aaaaaaaaaaaa\)"',
        ),
    ],
)
def test_what_was_measured_differently_is_refused(
    save: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    new, old = save("new", make_report(**changes)), save("old", make_report())
    with pytest.raises(DataError, match=said):
        compare(read_reports(new), read_reports(old), tolerance=0.5)


def test_each_of_several_data_sets_of_one_role_counts(save: Callable[..., Path]) -> None:
    def questions(*names: str) -> Report:
        sets = (DatasetInfo(role="q", name=n, fingerprint=n, count=1, num_classes=0) for n in names)
        return make_report(data=tuple(sets))

    new, old = save("new", questions("other", "vqav2")), save("old", questions("gqa", "vqav2"))
    with pytest.raises(DataError, match=r'q data is "other \(1, other\); vqav2 \(1, vqav2\)" in the one'):
        compare(read_reports(new), read_reports(old), tolerance=0.5)


def test_the_machines_settings_do_not_matter(save: Callable[..., Path]) -> None:
    settings = {"k": [20], "batch": 1, "workers": 3, "resolved": {"ranks": 8}}
    other = make_report(settings=settings, machine_settings=("batch", "workers"))
    new, old = save("new", other), save("old", make_report())
    assert not regressions(compare(read_reports(new), read_reports(old), tolerance=0.0))


def test_settings_of_the_machine_are_those_that_the_task_declares(save: Callable[..., Path]) -> None:
    """The batch of seg and vqa is what they train with; the batch of a forward pass changes nothing."""
    of_tasks = {task: set(machine_settings(evaluators[task]().settings())) for task in evaluators}
    assert set(machine_settings(RunSettings())) == {"batch_size", "workers", "cache", "device", "data_root"}
    assert {"save_maps", "head_seed"} <= of_tasks["seg"] and not {"lr", "batch"} & of_tasks["seg"]
    assert {"save_every", "fsdp", "predictions"} <= of_tasks["vqa"]
    assert not {"micro_batch", "batch"} & of_tasks["vqa"]

    def seg(batch: int, save_maps: int) -> Report:
        settings = {"batch": batch, "save_maps": save_maps, "lr": 1e-3}
        return make_report("seg", settings=settings, machine_settings=tuple(of_tasks["seg"]))

    base = save("base", seg(16, 0))
    assert not regressions(compare(read_reports(save("a", seg(16, 3))), read_reports(base), tolerance=0.0))
    with pytest.raises(DataError, match="batch is 4 in the one and 16 in the other"):
        compare(read_reports(save("b", seg(4, 0))), read_reports(base), tolerance=0.0)


def curve(sides: list[int], **metrics: float) -> Report:
    """A report over sides that the settings leave at their default."""
    settings = {"sides": None, "size": None, "resolved": {"sides": sides, "size": sides[:1], "ranks": 1}}
    named = {name: Metric(value=value) for name, value in metrics.items()}
    first = next(iter(named))
    return make_report("resolution", settings=settings, metrics=named, primary_metric=first, records="")


def test_a_metric_that_vanished_is_a_regression(save: Callable[..., Path]) -> None:
    new = save("new", curve([48], index=85, knn_index=85, knn_top1_48px=50))
    old = save("old", curve([48], index=80, knn_index=90, zeroshot_index=80))
    changes = compare(read_reports(new), read_reports(old), tolerance=6)
    assert verdicts(changes) == {
        "resolution index": "same",
        "resolution knn_index": "same",
        "resolution zeroshot_index": "missing",
    }
    (bad,) = regressions(changes)
    assert (bad.metric, bad.value, bad.baseline, bad.difference) == ("zeroshot_index", None, 80, None)
    assert "| zeroshot_index (%) |  | 80.00 |  |  | ✗ missing |" in markdown(changes)
    suite = Xml.fromstring(junit(changes))[0]
    assert suite.attrib["failures"] == "1" and suite[2][0].attrib["message"] == (
        "baseline 80.00, verdict ✗ missing"
    )


def test_resolved_values_that_the_task_declares_must_be_equal(save: Callable[..., Path]) -> None:
    """The side of a model's input may be its own; the sides of a curve may not, named or by default."""
    assert compared_settings(ResolutionSettings()) == ("sides", "tasks")

    def declared(sides: list[int]) -> Report:
        return replace(curve(sides, index=80), compared_settings=("sides", "tasks"))

    old = save("old", declared([48, 96]))
    for name, undeclared in (("a", False), ("stored", True)):  # reports that were written before have no list
        other = curve([32, 64], index=80) if undeclared else declared([32, 64])
        with pytest.raises(DataError, match=r"sides is \[32, 64\] in the one and \[48, 96\] in the other"):
            compare(read_reports(save(name, other)), read_reports(old), tolerance=0)
    named = declared([48, 96])
    named = replace(named, settings={**named.settings, "sides": [96, 48], "size": None})
    assert not regressions(compare(read_reports(save("n", named)), read_reports(old), tolerance=0))
    stored = save("s", curve([48, 96], index=80))
    assert not regressions(compare(read_reports(stored), read_reports(old), tolerance=0))
    assert Column.of(declared([48, 96])) == Column.of(named) != Column.of(declared([32, 64]))


def test_folders_without_reports(tmp_path: Path, save: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no such folder of reports"):
        read_reports(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no reports"):
        read_reports(tmp_path / "empty")
    folder = save("a", make_report())
    (folder / "noise.json").write_text('{"format": "am-radio-noise/1"}')
    assert len(read_reports(folder)) == 1
    (folder / "half.json").write_text('{"format": "am-rad')
    with pytest.raises(DataError, match=r"half\.json: is not JSON"):
        read_reports(folder)


@pytest.fixture
def changes(save: Callable[..., Path]) -> list[Change]:
    new = save("new", make_report(model="a|b<c>"), 100)
    return compare(read_reports(new), read_reports(save("old", make_report(), 120)), tolerance=0.5)


def test_markdown_keeps_its_table_whatever_names_hold(changes: list[Change]) -> None:
    text = markdown(changes)
    assert text.startswith("**1 regression** in 2 metrics\n")
    rows = [line for line in text.splitlines() if line.startswith("| knn")]
    assert len(rows) == 2 and "<c>" not in text
    assert rows[0].count("|") - rows[0].count("\\|") == 9
    assert "| 50.00 | 60.00 | -10.00 |" in rows[0] and rows[0].endswith("| ▼ worse |")


def test_junit_has_a_case_a_metric_and_a_failure_a_regression(changes: list[Change]) -> None:
    root = Xml.fromstring(junit(changes))
    (suite,) = root
    assert suite.attrib["name"] == "knn" and suite.attrib["failures"] == "1"
    assert [case.attrib["name"] for case in suite] == ["top1", "mean_class"]
    assert suite[0].attrib["classname"] == "knn.a|b<c>"
    (failure,) = suite[0]
    assert failure.attrib["message"].startswith("new 50.00, baseline 60.00, difference -10.00, 95 % ")
    assert len(suite[1]) == 0


def test_the_terminal_shows_every_metric(changes: list[Change]) -> None:
    table = terminal_table(changes, plain=True)
    assert table.row_count == 2
    assert [str(column.header) for column in table.columns][:3] == ["task", "model", "metric"]

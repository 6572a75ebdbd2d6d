"""Quality against speed: which reports are pairs, and what is drawn of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from evals.core.report import Metric, Report, write
from evals.reporting.tradeoff import FILE, draw_tradeoff


def report(task: str, model: str, value: float, fingerprint: str, **changes: Any) -> Report:
    primary_metric = "top1" if task == "knn" else "images_per_second"
    return Report(
        task=task,
        model=model,
        fingerprint=fingerprint,
        primary_metric=primary_metric,
        metrics={primary_metric: Metric(value=value, low=value - 5, high=value + 5)},
        settings={},
        data=(),
        device="cpu",
        seconds={},
        created="2024-01-01",
        versions={},
        **changes,
    )


def fill(folder: Path, *reports: Report) -> Path:
    for one in reports:
        write(one, folder / f"{one.task}-{one.model}.json")
    return folder


def test_reports_are_paired_by_weights_or_by_architecture(tmp_path: Path) -> None:
    folder = fill(
        tmp_path,
        report("knn", "trained", 60.0, "one"),
        report("throughput", "any-name", 100.0, "one"),
        report("knn", "student", 70.0, "two", metadata={"model": {"student": "e-radio-b"}}),
        report("throughput", "e-radio-b", 400.0, "untrained"),
        report("knn", "slow", 50.0, "three"),
        report("throughput", "fast", 900.0, "four"),
    )
    assert draw_tradeoff(folder) == folder / FILE
    svg = (folder / FILE).read_text()
    assert "trained" in svg and "student" in svg and "slow" not in svg
    assert {">100<", ">400<"} <= set(re.findall(">[0-9]+<", svg))
    assert ">900<" not in svg
    assert svg.startswith("<svg ") and "--s0:#1668b0" in svg  # colours of its own, without a page around it


def test_nothing_is_drawn_without_a_pair(tmp_path: Path) -> None:
    fill(tmp_path, report("knn", "a", 60.0, "one"), report("throughput", "b", 100.0, "two"))
    assert draw_tradeoff(tmp_path) is None
    assert not (tmp_path / FILE).exists()

"""Plots: well-formed, the same each time, with the page's colours, and names as text."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from evals.core.report import Metric, Report, write
from evals.reporting.figures import TRADEOFF_FILE, Series, bars, draw_tradeoff, lines
from radio.errors import MissingExtraError

NASTY = '<script>alert("1")</script> & \'q\' $x_1$ 😀 id="z" url(#q)'


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in Xml.fromstring(svg).iter("text")]


def curve(name: str = "a", slot: int = 0) -> Series:
    return Series(
        name=name,
        color=slot,
        x=(10.0, 20.0, 200.0),
        y=(1.0, None, 3.0),
        low=(0.5, None, None),
        high=(1.5, None, 4),
    )


def test_a_plot_is_the_same_each_time_and_its_ids_are_its_own() -> None:
    first, second = (lines([curve()], name=name, x_label="k", log_x=True) for name in ("one", "two"))
    assert first == lines([curve()], name="one", x_label="k", log_x=True)
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1] and all(each.startswith("one-") for each in ids[0])
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', first))
    assert used == ids[0]  # nothing points outside, nothing is without use
    assert not re.search(r"\d{4}-\d\d-\d\d|<style|<metadata|http:", first)


def test_the_colours_are_the_pages_variables() -> None:
    svg = lines([curve(slot=0), curve(slot=9)], name="p", x_label="k")
    assert {"var(--ink)", "var(--rule)", "var(--s0)", "var(--s1)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.findall(r"#[0-9a-f]{6}\b(?!-)", svg)  # no colour of its own
    assert "font-family" not in svg


def test_names_stay_text() -> None:
    svg = bars([NASTY[:20], "b\nc\x00d"], [Series(name="m", color=0, y=(1.0, None))], name="p", x_label=NASTY)
    assert "<script" not in svg
    assert NASTY[:20] in texts(svg) and NASTY in texts(svg) and "b c d" in texts(svg)


@pytest.mark.parametrize(("letter", "kept"), [("x", 23), ("W", 14), ("漢", 11), ("😀", 11), ("mi", 9)])
def test_long_names_leave_room_for_the_bars(letter: str, kept: int) -> None:
    """Were there none, matplotlib would warn, which is an error here."""
    svg = bars([letter * 50], [Series(name="m", color=0, y=(1.0,))], name="p", x_label="%")
    (shown,) = [text for text in texts(svg) if "…" in text]
    assert shown.startswith(letter * (kept // len(letter))) and kept <= len(shown) <= kept + 9


def test_a_bar_is_as_long_as_its_value() -> None:
    series = [Series(name="m", color=0, y=(10.0, 20.0)), Series(name="n", color=1, y=(None, 40.0))]
    svg = bars(["a", "b"], series, name="p", x_label="%")
    widths = []
    for path in Xml.fromstring(svg).iter("path"):
        if re.search(r"fill: var\(--s\d\)", path.get("style", "")):
            xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.get("d", ""))]
            widths.append(max(xs) - min(xs))
    assert [round(width / widths[0], 3) for width in widths] == [1, 2, 4]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"am-radio\[report\]"):
        lines([curve()], name="p", x_label="k")


def test_settings_that_lie_in_the_folder_change_no_figure() -> None:
    plain = lines([curve()], name="one", x_label="k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(matplotlib.rcParams, "text.usetex", True)  # runs LaTeX, and what the text tells it to
        patch.setitem(matplotlib.rcParams, "lines.linewidth", 17.0)
        assert lines([curve()], name="one", x_label="k") == plain


def make_report(task: str, model: str, value: float, fingerprint: str, **changes: Any) -> Report:
    primary_metric, unit = ("top1", "%") if task == "knn" else ("images_per_second", "images/s")
    return Report(
        task=task,
        model=model,
        fingerprint=fingerprint,
        primary_metric=primary_metric,
        metrics={primary_metric: Metric(value=value, low=value - 5, high=value + 5, unit=unit)},
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
        make_report("knn", "trained", 60.0, "one"),
        make_report("throughput", "any-name", 100.0, "one"),
        make_report("knn", "student", 70.0, "two", metadata={"model": {"student": "e-radio-b"}}),
        make_report("throughput", "e-radio-b", 400.0, "untrained"),
        make_report("knn", "slow", 50.0, "three"),
        make_report("throughput", "fast", 900.0, "four"),
    )
    assert draw_tradeoff(folder, "knn") == folder / TRADEOFF_FILE
    svg = (folder / TRADEOFF_FILE).read_text()
    assert "trained" in svg and "student" in svg and "slow" not in svg
    assert {">100<", ">400<"} <= set(re.findall(">[0-9]+<", svg))
    assert ">900<" not in svg
    assert svg.startswith("<svg ") and "--s0:#1668b0" in svg  # colours of its own, without a page around it


def test_nothing_is_drawn_without_a_pair(tmp_path: Path) -> None:
    fill(tmp_path, make_report("knn", "a", 60.0, "one"), make_report("throughput", "b", 100.0, "two"))
    assert draw_tradeoff(tmp_path, "knn") is None
    assert not (tmp_path / TRADEOFF_FILE).exists()

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evals.core.report import Metric, Report, write
from evals.reporting.trend import find_jumps, read_nights, write_trend
from radio import entry
from radio.errors import DataError


def night(root: Path, day: int, values: dict[str, float], **changes: Any) -> None:
    """One night's k-NN of some models, made on a day by a commit of that number."""
    for model, value in values.items():
        report = Report(
            **{
                "task": "knn",
                "model": model,
                "fingerprint": "f",
                "primary_metric": "top1",
                "metrics": {"top1": Metric(value=value, low=value - 2, high=value + 2)},
                "settings": {"k": [20]},
                "data": (),
                "device": "cpu",
                "seconds": {},
                "created": f"2026-01-{day:02d}T03:00:00+00:00",
                "versions": {},
                "git": f"{day:02d}" * 20,
                **changes,
            }
        )
        write(report, root / f"run-{40 - day}" / f"knn-{model}.json")


@pytest.fixture
def nights(tmp_path: Path) -> Path:
    """Five nights whose folders sort the other way round; the third fell, the fourth has another protocol."""
    root = tmp_path / "nights"
    night(root, 1, {"a": 80.0, "<b>": 50.0})
    night(root, 2, {"a": 80.5})
    night(root, 3, {"a": 70.0, "<b>": 50.2})
    night(root, 4, {"a": 90.0}, settings={"k": [10]})
    night(root, 5, {"a": 90.2}, settings={"k": [10]})
    return root


def test_nights_stand_in_the_order_they_were_made(nights: Path) -> None:
    assert [found.created[8:10] for found in read_nights(nights)] == ["01", "02", "03", "04", "05"]


def test_jumps_name_the_commits_between_which_they_lie(nights: Path) -> None:
    (jump,) = find_jumps(read_nights(nights), tolerance=1.0)
    assert (jump.task, jump.model, jump.metric) == ("knn", "a", "top1")
    assert (jump.before.value, jump.after.value) == (80.5, 70.0)
    assert jump.commits == ("0202020202", "0303030303")
    assert [j.model for j in find_jumps(read_nights(nights), tolerance=0.1)] == ["a", "<b>", "a", "a"]


def test_the_page_is_written_whole_and_escaped(nights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = nights.parent / "trend.html"
    assert entry.evaluate(["trend", str(nights), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "run-37: knn a top1 80.5 to 70.0" in out and "1 jumps" in out
    text = page.read_text()
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "0202020202 → 0303030303" in text and "<svg" in text
    size, _ = write_trend(nights, page, 1.0)
    assert size == len(text.encode())
    assert page.read_text() == text


def test_a_trend_needs_two_nights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of nights"):
        read_nights(tmp_path / "no")
    night(tmp_path, 1, {"a": 1.0})
    with pytest.raises(DataError, match="holds 1 nights, and a trend needs two"):
        read_nights(tmp_path)

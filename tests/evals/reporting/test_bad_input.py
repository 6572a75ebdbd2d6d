"""Report folders that somebody else wrote: a page, a comparison, or one error in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evals.core.report import DatasetInfo, Metric, Report, read, write
from evals.reporting.command import junit, markdown
from evals.reporting.compare import Change, StoredReport, compare, paired_interval, read_reports
from evals.reporting.page import make_page, render
from radio import entry
from radio.config import to_plain
from radio.errors import DataError

from .conftest import Folder

TASKS = ("knn", "seg", "throughput", "a stranger's")
LINES: tuple[dict[str, Any], ...] = (
    {"id": "a.png", "score": 1, "label": "a", "predictions": ["b"], "neighbours": ["c.png"]},
    {"id": 7, "part": "gqa", "unit": "a.png", "score": 0.5},
    {"id": "a.png", "areas": [[0, 1, 2, 3]]},
    {"id": "a.png", "part": "images", "rank": 3},
)


def make(task: str = "knn", **changes: Any) -> Report:
    values: dict[str, Any] = {
        "model": "a",
        "fingerprint": "f",
        "primary_metric": "top1",
        "metrics": {
            "top1": Metric(value=50.0),
            "top1_k5": Metric(value=40.0),
            "top1_few_shot_1": Metric(value=9),
        },
        "settings": {"k": [5, 20], "seed": 0, "bank": None, "resolved": {"chance": 5.0}},
        "data": (DatasetInfo(role="query", name="d", fingerprint="a", count=9, num_classes=2),),
        "device": "cpu",
        "seconds": {},
        "created": "2026-01-01",
        "versions": {},
        "files": ("x.jsonl", "x.png"),
        "records": "x.jsonl",
    }
    return Report(task=task, **{**values, **changes})


def seal(data: dict[str, Any]) -> str:
    """A report file with the right hash, whatever it holds."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return json.dumps({**data, "sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()})


_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400)
    | st.builds(lambda: [[[]]])
)


@st.composite
def changed(draw: st.DrawFn, plain: Any) -> Any:
    """Plain data with a few values replaced, taken away or added, at any depth."""
    plain = copy.deepcopy(plain)
    for _ in range(draw(st.integers(1, 3))):
        place, inner = plain, plain
        while isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
            place, inner = (
                inner,
                inner[draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))],
            )
        if isinstance(place, dict):
            key = draw(st.sampled_from([*place, "extra", "top1_k²", "top1_few_shot_0"]))
            if draw(st.booleans()):
                place[key] = draw(_VALUES | st.builds(dict) | st.lists(_VALUES, max_size=3))
            else:
                place.pop(key, None)
        elif isinstance(place, list):
            place.insert(0, draw(_VALUES))
    return plain


_FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(_FUZZ, max_examples=40)
@given(data=st.data())
def test_a_report_of_any_shape_is_shown_or_refused(folder: Folder, data: st.DataObject) -> None:
    task = data.draw(st.sampled_from(TASKS))
    whole = to_plain(make(task, blocks=folder.blocks("a", 50.0)))
    block = data.draw(st.sampled_from(range(len(whole["blocks"]))))
    if data.draw(st.booleans()):
        whole["blocks"][block] = data.draw(changed(whole["blocks"][block]))
    else:
        whole = data.draw(changed(whole))
    path = folder.path / "x.json"
    path.write_text(seal(whole), encoding="utf-8")
    line = data.draw(changed(data.draw(st.sampled_from(LINES))))
    folder.records("x.jsonl", line, LINES[0])
    try:
        report = read(path)
    except DataError:
        return
    for each in report.metrics.values():
        assert math.isfinite(each.value)
    render(make_page(folder.path))
    both = {(report.task, report.model): StoredReport(report, path)}
    changes = compare(both, both, tolerance=0.0)
    Xml.fromstring(junit(changes))
    assert markdown(changes).count("\n| ") == len(changes) + 1


@_FUZZ
@given(line=st.sampled_from(LINES).flatmap(changed) | _VALUES, raw=st.binary(max_size=9))
def test_a_record_of_any_shape_is_read_or_left_out(tmp_path: Path, line: Any, raw: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(json.dumps(line).encode() + b"\n" + raw)
    for pairing, value in (("mean", 100.0), ("mean_iou", 25.0)):
        report = make(pairing=pairing, metrics={"top1": Metric(value=value)})
        entry = StoredReport(report, tmp_path / "x.json")
        assert paired_interval(entry, entry) in (None, (0.0, 0.0))


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    lines = [{"id": str(n), "score": 1.0, "answer": "left\u2028\x85right"} for n in range(3)]
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    entry = StoredReport(make(metrics={"top1": Metric(value=100.0)}), tmp_path / "x.json")
    assert paired_interval(entry, entry) == (0.0, 0.0)


def test_names_that_are_no_utf8_are_written_and_read(tmp_path: Path) -> None:
    used = DatasetInfo(role="query", name="caf\udce9", fingerprint="a", count=1, num_classes=1)
    write(make(data=(used,)), tmp_path / "x.json")
    assert read(tmp_path / "x.json").data[0].name == "caf\ufffd"


def test_two_reports_of_one_task_and_model_are_refused(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write(make(), tmp_path / name)
    with pytest.raises(DataError, match=r"a\.json and b\.json are both of knn and a; keep one of them"):
        read_reports(tmp_path)


@pytest.fixture
def odd_change() -> Change:
    return Change(
        task="knn",
        model="exp\x081 \ud83d <b> [/b]",
        metric="top1\x1b[31m",
        unit="%",
        value=1.0,
        baseline=2.0,
        verdict="worse",
    )


def test_junit_parses_whatever_signs_names_hold(odd_change: Change) -> None:
    (suite,) = Xml.fromstring(junit([odd_change]))
    (case,) = suite
    assert case.attrib == {"classname": "knn.exp\ufffd1 \ufffd <b> [/b]", "name": "top1\ufffd[31m"}
    assert "\x1b" not in markdown([odd_change]) and "\\x1b" in markdown([odd_change]).replace("\\\\", "\\")


def test_names_with_markup_and_escapes_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(make(model="[/b]\x1b[31m"), tmp_path / "x" / "a.json")
    assert entry.evaluate(["compare", str(tmp_path / "x"), "--baseline", str(tmp_path / "x"), "--plain"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[/b]" in out


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff", b"9" * 5000, b"null", b'{"format": "am-radio-report/2"}']
)
def test_damaged_reports_are_one_error_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    for command in (["compare", str(tmp_path), "--baseline", str(tmp_path)], ["report", str(tmp_path)]):
        assert entry.evaluate(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "a.json: " in line


def test_a_full_disk_leaves_the_old_page_and_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(make("throughput"), tmp_path / "a.json")
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    command = ["report", str(tmp_path), "--html", str(page)]
    assert entry.evaluate(command) == 2
    assert "page.html: No space left on device; free some space" in capsys.readouterr().err
    assert page.read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"a.json", "page.html"}


def test_rows_longer_than_their_table_are_refused(tmp_path: Path) -> None:
    plain = to_plain(make())
    plain["blocks"] = [{"kind": "table", "title": "odd", "columns": ["a"], "rows": [[1], [1, 2]]}]
    (tmp_path / "a.json").write_text(seal(plain))
    with pytest.raises(DataError, match="row 1 of a table has 2 cells under 1 columns"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("place", ["", "fifo", "a\0b", "x" * 300, "folder", "/dev/null", "gone/\0"])
def test_pages_and_tables_go_into_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("folder").mkdir()
    write(make("throughput"), tmp_path / "reports" / "a.json")
    commands = [
        ["report", "reports", "--html", place],
        ["trend", "reports", "--html", place],
        ["compare", "reports", "--baseline", "reports", "--markdown", place],
        ["compare", "reports", "--baseline", "reports", "--junit", place],
    ]
    for command in commands:
        assert entry.evaluate(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert Path("fifo").is_fifo() and Path("/dev/null").is_char_device()
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "folder", "reports"}

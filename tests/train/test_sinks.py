"""The JSONL file survives kills; the console says what it should."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from train.sinks import JsonLines, ProgressConsole


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    log = JsonLines(path, 0, print)
    log.write({"step": 1, "loss": 0.1})
    log.write({"step": 2, "loss": 0.30000000000000004})
    assert records(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.30000000000000004}]
    log.close()


def test_a_mean_over_no_steps_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0, print)
    log.write({"step": 3, "loss": float("nan"), "skipped": 3, "not_finite": "clip/spatial"})
    log.close()
    assert path.read_text() == '{"step": 3, "loss": null, "skipped": 3, "not_finite": "clip/spatial"}\n'


def test_later_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (2, 4, 6, 8)]
    path.write_text("\n".join([*lines, '{"step": 10, "lo']))
    log = JsonLines(path, 5, print)
    assert [record["step"] for record in records(path)] == [2, 4]
    log.write({"step": 6, "loss": 0.5})
    log.close()
    assert [record["step"] for record in records(path)] == [2, 4, 6]


def test_a_line_without_a_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1}\n{"step": 1}\n')
    JsonLines(path, 1, print).close()
    assert records(path) == [{"step": 1}]


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with ProgressConsole(Console(file=out, width=40), "demo", 10, 0) as bar:
        bar.advance(1)
        bar.advance(2, "loss 1.25  clip 0.500/0.250  a line longer than the console is wide")
        bar.advance(3)
    line = "demo 2/10  loss 1.25  clip 0.500/0.250  a line longer than the console is wide\n"
    assert out.getvalue() == line


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with ProgressConsole(console, "demo", 10, 4) as bar:
        bar.advance(7, "loss 1.25")
        bar.advance(8)
    assert "demo" in out.getvalue()
    assert "8/10" in out.getvalue()
    assert "loss 1.25" in out.getvalue()  # figures stay until the next ones

"""Records in the file, in TensorBoard and at W&B, whatever happened to the file between two runs."""

from __future__ import annotations

import errno
import io
import json
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from radio.errors import ConfigError, DataError, MissingExtraError, RadioError
from train.config import TrainConfig
from train.loggers import JsonLines, ProgressConsole, open_log, read_lines, read_records

GOOD = '{"step": 2, "loss": 0.5, "skipped": 0, "not_finite": "clip/spatial", "mfu": null}'
BAD = (
    "[" * 100_000,
    '{"step": ' * 100_000,
    '{"step": 1' + "0" * 5000 + "}",
    '{"step": 1, "loss": NaN}',
    '{"step": 1, "loss": 1e999}',
    "Infinity",
    "[1, 2]",
    "[[1]]",
    '"\\ud800"',
    '"step"',
    "null",
    "7",
    "{}",
    '{"step": -1}',
    '{"step": 1.5}',
    '{"step": true}',
    '{"step": "1"}',
    '{"step": 1, "loss": [1]}',
    "\0\0\0",
    '{"step": 1, "los',
    '{"step": 1, "loss":',
)


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_whole_records_are_kept_and_the_rest_is_told_and_set_aside(tmp_path: Path, bad: str) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    text = f"{GOOD}\n{bad}\n{GOOD}\n"
    path.write_text(text)
    JsonLines(path, 5, said.append).close()
    assert path.read_text() == f"{GOOD}\n{GOOD}\n"
    (line,) = said
    assert "1 lines are no records, and left out" in line
    (aside,) = tmp_path.glob("metrics.damaged-*.jsonl")
    assert aside.read_text() == text
    assert str(aside) in line


def test_bytes_that_are_no_text_spoil_their_own_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"step": 3, "name": "caf\xe9"}\n' + GOOD.encode() + b"\n")
    assert [len(read_lines(path).records), read_lines(path).num_others] == [2, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_damage(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n", encoding=encoding)
    assert read_records(path) == [json.loads(GOOD)] * 2
    assert read_lines(path).num_others == 0


def test_a_line_that_a_kill_cut_off_goes_without_a_word(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_text(f'{GOOD}\n{{"step": 3, "lo')
    JsonLines(path, 5, said.append).close()
    assert (path.read_text(), said) == (f"{GOOD}\n", [])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl: is a folder"):
        JsonLines(tmp_path / "metrics.jsonl", 0, print)


class FullDisk:
    """A file that takes part of a record, then nothing, until there is room again."""

    def __init__(self, file: Any) -> None:
        self.file, self.full, self.calls = file, False, 0

    def write(self, data: memoryview) -> int:
        if not self.full:
            return int(self.file.write(data))
        self.calls += 1
        if self.calls % 2:
            return int(self.file.write(data[:5]))
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_on_a_full_disk_records_are_kept_until_there_is_room(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    log = JsonLines(path, 0, said.append)
    disk: Any = FullDisk(log._file)
    log._file = disk
    log.write({"step": 1})
    disk.full = True
    log.write({"step": 2})
    log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n'  # no half of a record
    assert said == [
        f"{path} could not be written (No space left on device); its records are kept until it can"
    ]
    disk.full = False
    log.write({"step": 4})
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4]
    disk.full = True
    log.write({"step": 5})
    with pytest.raises(RadioError, match=r"the last records could not be written \(No space left"):
        log.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just(GOOD.encode()), st.binary(max_size=40), st.sampled_from([b.encode() for b in BAD[2:]])
        )
    )
)
def test_any_bytes_leave_every_good_line(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        found = [line for line, _ in read_lines(path).records]
        bare = [part for line in lines for part in line.split(b"\n")]
        if bare and not bare[0].startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 says so in its first bytes
            assert found.count(GOOD) >= bare.count(GOOD.encode())
        JsonLines(path, 5, lambda line: None).close()
        assert read_lines(path).num_others == 0


def read_json(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    log = JsonLines(path, 0, print)
    log.write({"step": 1, "loss": 0.1})
    log.write({"step": 2, "loss": 0.30000000000000004})
    assert read_json(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.30000000000000004}]
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
    assert [record["step"] for record in read_json(path)] == [2, 4]
    log.write({"step": 6, "loss": 0.5})
    log.close()
    assert [record["step"] for record in read_json(path)] == [2, 4, 6]


def test_a_line_without_a_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1}\n{"step": 1}\n')
    JsonLines(path, 1, print).close()
    assert read_json(path) == [{"step": 1}]


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


RECORDS = (
    {"step": 5, "loss": 2.0, "sam/spatial": 0.5, "not_finite": "clip/spatial"},
    {"step": 10, "loss": 1.0, "sam/spatial": None},
)


def test_every_sink_gets_every_record(config: TrainConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(replace(config, loggers=("tensorboard",)), 0, print)
    for record in RECORDS:
        log.write(record)
    log.close()
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(RECORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = EventAccumulator(str(config.out / "tensorboard"))
        events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 2.0), (10, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("sam/spatial")] == [(5, 0.5)]
    assert events.Tags()["tensors"] == ["not_finite/text_summary"]


def test_wandb_offline(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen = replace(config, loggers=("wandb",))
    for step in (0, 5):  # begun, and taken up
        log = open_log(chosen, step, print)
        log.write(RECORDS[bool(step)])
        log.close()
    files = sorted((config.out / "wandb").glob("offline-run-*/run-*.wandb"))
    name = (config.out / "wandb-id.txt").read_text()
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert b"sam/spatial" in files[0].read_bytes()
    assert all(len(line) < 200 for line in (config.out / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_names_its_extra(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"am-radio\[{name}\]"):
        open_log(replace(config, loggers=(name,)), 0, print)  # type: ignore[arg-type]
    assert not Path(config.out / "metrics.jsonl").exists()


def test_a_service_that_takes_no_run_is_one_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"takes no run \(No API key configured\); log in with `wandb login`"
    ):
        open_log(replace(config, loggers=("wandb",)), 0, print)


@pytest.mark.parametrize(
    ("left", "step", "every", "begins"),
    [
        (None, 6, 0, "the 6 steps before, and begins with step 9"),
        ("", 6, 4, "the 6 steps before, and begins with step 9"),
        ('{"step": 9}\n', 6, 0, "the 6 steps before, and begins with step 9"),
        (None, 6, 2, "the 6 steps before, and begins with step 6"),  # evaluated once more
        (None, 11, 0, "the 11 steps before, and begins with step 12"),
        (None, 2, 0, ""),
        (None, 0, 0, ""),
        ('{"step": 3}\n', 6, 0, ""),
    ],
)
def test_a_log_that_is_gone_when_a_run_goes_on_is_told(
    config: TrainConfig, left: str | None, step: int, every: int, begins: str
) -> None:
    config.out.mkdir()
    if left is not None:
        (config.out / "metrics.jsonl").write_text(left)
    told: list[str] = []
    open_log(replace(config, log_every=3, eval_every=every), step, told.append).close()
    assert told == ([f"{config.out / 'metrics.jsonl'}: holds no record of {begins}"] if begins else [])

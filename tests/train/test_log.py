"""Records in the file, in TensorBoard and at W&B; sinks that are not installed."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from radio.errors import ConfigError, MissingExtraError
from train.config import TrainConfig
from train.log import open_log

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

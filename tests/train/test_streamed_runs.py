"""Whole runs over shards: damage is passed over and counted, and a stop changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from radio.errors import CheckpointError, DataError
from train.config import DataConfig, TeacherConfig, TrainConfig
from train.data.crops import seed_of, shuffled_index
from train.data.errors import LOG_KEYS
from train.trainer import Trainer

from .conftest import TEACHERS, Start, fill_shard, read_records, same_weights, untimed
from .data.test_sources import damaged


def streamed(config: TrainConfig, pattern: str, **changes: object) -> TrainConfig:
    """The run over shards, with a second group."""
    few = TeacherConfig(name="sam", model="tiny:sam", summary_weight=0.0, batch_size=2)
    data = replace(DataConfig(shards=(pattern,), workers=0, max_error_fraction=0.7), **changes)  # type: ignore[arg-type]
    return replace(config, teachers=(*TEACHERS[:2], few), data=data)


CONTENT = {  # what reading a shard of `damaged` to its end gives
    0: ["good"] * 4,
    1: ["good"] * 4,
    2: ["good"] * 3 + ["truncated"],
    3: ["good", "image", "good"],
    4: ["empty"],
    5: ["missing"],
}


def met(images: int, seed: int) -> Counter[str]:
    """The faults on one lane's way to so many images."""
    order = seed_of(seed_of(seed, "group", 0), "source", 0)
    faults: Counter[str] = Counter()
    for place in count():
        for event in CONTENT[shuffled_index(place, 6, order)]:
            if event != "good":
                faults[event] += 1
            elif (images := images - 1) == 0:
                return faults
    raise AssertionError("the shards never end")


def test_damaged_shards_are_passed_over_and_counted(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    data = DataConfig(
        shards=(damaged(tmp_path / "shards"),), workers=1, num_streams=1, max_error_fraction=0.7
    )
    run = start(config, data=data)
    run.train()
    records = read_records(config.out)
    for record in records:
        wanted = met(4 * int(record["step"]), config.seed)
        assert record["broken"] == sum(wanted.values())
        assert {name: n for name, n in record.items() if name.startswith("data/")} == {
            LOG_KEYS[cause]: n for cause, n in wanted.items()
        }
    assert len(wanted) == 4
    listed = [json.loads(line) for line in (config.out / "broken.jsonl").read_text().splitlines()]
    assert sorted((entry["cause"], Path(entry["where"]).name) for entry in listed) == [
        ("empty", "4.tar"),
        ("image", "00031.jpg"),
        ("missing", "5.tar"),
        ("truncated", "2.tar"),
    ]
    text = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "missing shards" in text
    assert str(config.out / "broken.jsonl") in text.replace("\n", "")


def test_too_many_damaged_shards_stop_a_run(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    fill_shard(tmp_path / "0.tar", 0, 3)
    with pytest.raises(DataError, match=r"of \d+ shards cannot be read; mend the data or raise --data"):
        start(streamed(config, f"{tmp_path}/{{0..30}}.tar", max_error_fraction=0.5)).train()


class StoppedError(Exception):
    """What a kill is here."""


def stopped(run: Trainer, step: int) -> None:
    """Train up to a step and no further."""
    genuine = run.train_step

    def advance(batch: object) -> None:
        if run.step == step:
            raise StoppedError
        genuine(batch)  # type: ignore[arg-type]

    run.train_step = advance  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        run.train()


@pytest.mark.parametrize(
    ("step", "workers"),
    [(6, 2), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(11, 0, marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    config: TrainConfig, start: Start, tmp_path: Path, step: int, workers: int
) -> None:
    pattern = damaged(tmp_path / "shards")
    settings = streamed(config, pattern)
    start(settings, out=tmp_path / "whole").train()
    stopped(start(settings, out=tmp_path / "cut", save_every=2), step)
    moved = tmp_path / "elsewhere"
    (tmp_path / "shards").rename(moved)
    data = replace(settings.data, shards=(f"{moved}/{{0..5}}.tar",), workers=workers)
    start(settings, out=tmp_path / "cut", data=data).train()
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_other_shards_are_another_run(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    for number in range(3):
        fill_shard(tmp_path / f"{number}.tar", 10 * number, 5)
    start(streamed(config, f"{tmp_path}/{{0..1}}.tar"), steps=1).train()
    with pytest.raises(CheckpointError, match="other settings"):
        start(streamed(config, f"{tmp_path}/{{0..2}}.tar"), steps=1)

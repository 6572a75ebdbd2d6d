"""Results of rows: their files, and when one is still valid."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from radio.config import defaults_of, difference, to_plain
from radio.errors import DataError
from train.config import CacheConfig, TrainConfig
from train.recipes import recipes
from train.tables.layout import Evaluation
from train.tables.making import Row, is_done, protocols_of
from train.tables.results import (
    RowResult,
    Score,
    deciding_settings,
    final_losses,
    merge,
    read_result,
    write_result,
)

SMOKE = recipes["smoke"]()


def result_of(config: TrainConfig, **changes: object) -> RowResult:
    made = RowResult(name="row", settings=deciding_settings(config), student=config.student)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_result_reads_back_and_is_small(tmp_path: Path) -> None:
    blocks = tuple(((float(i), 2.5), (50.0, 50.0)) for i in range(30))
    score = Score(value=81.5, low=80.0, high=83.0, pairing="mean", blocks=blocks)
    result = result_of(SMOKE, scores={"knn": {"top1": score}}, values={"summary_loss": 0.25})
    write_result(tmp_path, result)
    assert read_result(tmp_path, "row") == result
    assert len((tmp_path / "row.json").read_text().splitlines()) < 200  # a list of numbers is one line
    assert read_result(tmp_path, "other") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "row"}', '{"name": "row", "settings": {}, "more": 1}'])
def test_a_damaged_result_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text(text)
    with pytest.raises(DataError, match=r"row\.json: is no result of a row .*; delete it to make it again"):
        read_result(tmp_path, "row")


@dataclass(frozen=True)
class Old:
    rate: float = 1.0
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class New:
    rate: float = 1.0
    names: tuple[str, ...] = ("a",)
    extra: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Required:
    rate: float


def _is_same(stored: dict[str, Any], settings: Any) -> bool:
    return not difference(stored, to_plain(settings), defaults_of(settings))


def test_a_setting_that_came_later_is_its_default() -> None:
    stored = to_plain(Old(rate=2.0))
    assert _is_same(stored, New(rate=2.0))
    assert not _is_same(stored, New(rate=2.0, extra=[1]))
    assert not _is_same({}, Required(rate=2.0))  # which no earlier program can have had
    assert not _is_same(stored, New())  # as if a default had changed
    assert not _is_same({**stored, "gone": 1}, New(rate=2.0))  # a setting that was removed


def row_of(config: TrainConfig) -> Row:
    seg = Evaluation("seg", options=(("crop", 48),))
    return Row(name="row", config=config, evaluations=(Evaluation("knn"), seg))


def test_a_row_is_done_while_neither_student_nor_protocols_change(tmp_path: Path) -> None:
    row = row_of(SMOKE)
    assert not is_done(row, tmp_path)
    protocols = {key: to_plain(own) for key, own in protocols_of(row).items()}
    write_result(tmp_path, result_of(SMOKE, protocols=protocols))
    assert is_done(row, tmp_path)
    assert is_done(row_of(replace(SMOKE, out=Path("elsewhere"), device="cpu", log_every=1)), tmp_path)
    assert is_done(row_of(replace(SMOKE, data=replace(SMOKE.data, workers=0))), tmp_path)
    assert not is_done(row_of(replace(SMOKE, seed=1)), tmp_path)
    assert not is_done(row_of(replace(SMOKE, data=replace(SMOKE.data, flip=0.0))), tmp_path)
    more = replace(row, evaluations=(*row.evaluations, Evaluation("zeroshot")))
    assert not is_done(more, tmp_path)
    other = replace(row, evaluations=(Evaluation("seg", options=(("crop", 60),)),))
    assert not is_done(other, tmp_path)
    write_result(tmp_path, result_of(SMOKE, protocols={key: protocols[key] for key in ("knn",)}))
    assert not is_done(row, tmp_path)


def test_scores_of_the_same_student_are_joined() -> None:
    old = result_of(SMOKE, scores={"knn": {"top1": Score(value=1.0)}}, seconds={"train": 3.0})
    new = result_of(SMOKE, scores={"seg": {"miou": Score(value=2.0)}})
    assert set(merge(old, new, {}).scores) == {"knn", "seg"}
    assert merge(old, new, {}).seconds == {"train": 3.0}
    left = replace(old, left_out={"seg": "no library", "vqa": "no tokens"})
    assert merge(left, new, {}).left_out == {"vqa": "no tokens"}  # seg could be scored later
    other = result_of(replace(SMOKE, seed=3))
    assert merge(old, other, {}) == other
    assert merge(None, new, {}) == new
    before = replace(old, settings={name: own for name, own in old.settings.items() if name != "damp"})
    assert set(merge(before, new, defaults_of(SMOKE)).scores) == {"knn", "seg"}  # when there was no damp


def test_a_student_of_cached_features_is_another(tmp_path: Path) -> None:
    row = row_of(SMOKE)
    cached = replace(SMOKE, cache=CacheConfig(folder=tmp_path / "features", crops=3))
    protocols = {key: to_plain(own) for key, own in protocols_of(row).items()}
    write_result(tmp_path, result_of(cached, protocols=protocols))
    assert not is_done(row, tmp_path) and is_done(row_of(cached), tmp_path)
    write_result(tmp_path, result_of(SMOKE, protocols=protocols))
    assert is_done(row, tmp_path) and not is_done(row_of(cached), tmp_path)


def test_the_losses_of_the_last_tenth(tmp_path: Path) -> None:
    records = [
        {"step": step, "loss": 1.0, "clip/summary": step / 100, "clip/spatial": 0.5, "sam/spatial": 0.25}
        for step in range(1, 21)
    ]
    lines = [json.dumps(record) for record in (*records, {"step": 20, "knn/top1": 50.0})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    losses = final_losses(tmp_path, ["clip", "sam"])
    assert losses == {"summary_loss": pytest.approx(0.195), "feature_loss": pytest.approx(0.375)}

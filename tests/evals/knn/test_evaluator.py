from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from PIL import Image

from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.knn import KnnSettings
from radio.data import open_source
from radio.dist import joined
from radio.errors import ConfigError, DataError, RadioError
from radio.images import evaluation_view
from radio.model import ModelConfig, build
from radio.types import Backbone


def run(model: Any, settings: KnnSettings, out: Path, **changes: Any) -> Report:
    """Evaluate with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", **changes})
    return run_evaluator(make_evaluator("knn"), model, settings, out, run=shared)


@pytest.fixture
def settings(tmp_path: Path, make_folder: Callable[..., Path]) -> KnnSettings:
    """Five classes, 30 images in the bank and 20 to classify."""
    bank = make_folder(tmp_path / "d" / "train", classes=5, count=6)
    query = make_folder(tmp_path / "d" / "val", classes=5, count=4, first=100)
    return KnnSettings(bank=str(bank), query=str(query), k=(3, 7), primary_k=7)


def slow_predictions(model: Any, settings: KnnSettings, k: int) -> list[int]:
    """The protocol as a loop over queries."""
    sides = []
    for text in (settings.bank, settings.query):
        source = open_source(str(text))
        views = torch.stack(
            [evaluation_view(source.read(i), model.native_size) for i in range(len(source.keys))]
        )
        sides.append((F.normalize(model(views).summary), source.labels))
    (bank, labels), (queries, _) = sides
    predictions = []
    for query in queries:
        similarities = bank @ query
        scores = np.zeros(5)
        for place in similarities.argsort(descending=True)[:k].tolist():
            scores[labels[place]] += np.exp(float(similarities[place]) / 0.07)
        predictions.append(int(scores.argmax()))
    return predictions


def test_the_report_equals_the_protocol_as_a_loop(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    model = backbone()
    report = run(model, settings, tmp_path / "out")
    labels = open_source(str(settings.query)).labels
    for k, name in ((7, "top1"), (3, "top1_k3")):
        right = sum(
            int(p == label) for p, label in zip(slow_predictions(model, settings, k), labels, strict=True)
        )
        assert report.metrics[name].value == pytest.approx(100 * right / 20)
    assert 20 < report.metrics["top1"].value < 100  # hard enough to tell
    assert read(tmp_path / "out" / "knn-pooled.json") == report
    assert report.fingerprint == model.fingerprint
    assert [(used.role, used.count) for used in report.data] == [("bank", 30), ("query", 20)]
    assert report.settings["k"] == [3, 7]
    assert report.settings["resolved"]["size"] == [32, 32]


def test_records_name_neighbours_and_predictions(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    model = backbone()
    run(model, settings, tmp_path / "out")
    lines = (tmp_path / "out" / "knn-pooled.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == list(open_source(str(settings.query)).keys)
    predicted = [int(record["predictions"][0][1:]) for record in records]
    assert predicted == slow_predictions(model, settings, 7)
    bank_keys = open_source(str(settings.bank)).keys
    for record in records:
        assert record["id"].startswith(record["label"])
        assert len(record["neighbours"]) == 7
        assert record["neighbours"] == [bank_keys[place] for place in record["neighbour_ids"]]
        assert record["similarities"] == sorted(record["similarities"], reverse=True)


def test_the_batch_size_and_a_second_run_change_nothing(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    first = run(backbone(), settings, tmp_path / "one")
    model = backbone()
    assert run(model, settings, tmp_path / "two").metrics == first.metrics
    assert model.calls == 0  # all from the cache
    fresh = run(backbone(), settings, tmp_path / "three", batch_size=3, cache=tmp_path / "other", workers=2)
    assert fresh.metrics == first.metrics


def test_altered_features_in_the_cache_change_no_score_and_are_told(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    first = run(backbone(), settings, tmp_path / "one")
    for path in (tmp_path / "cache" / "features").glob("*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(reversed(data[len(data) // 2 :]))
        path.write_bytes(data)
    again = run(backbone(), settings, tmp_path / "two")
    assert again.metrics == first.metrics
    assert any(note.startswith("2 damaged files of the cache were made again") for note in again.notes)
    third = run(backbone(), settings, tmp_path / "three")
    assert third.notes == first.notes  # now they are whole


def test_leave_one_out_classifies_the_bank_without_itself(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    alone = replace(settings, query=None, leave_one_out=True, k=(3, 29, 30), primary_k=3)
    report = run(backbone(), alone, tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "knn-pooled.jsonl").read_text().splitlines()]
    assert len(records) == 30
    assert all(record["id"] not in record["neighbours"] for record in records)
    assert [used.role for used in report.data] == ["bank"]
    assert report.notes == ("k = 30 is more than the 29 images of the bank; all of them voted",)


def test_more_neighbours_than_images_are_clamped_with_a_note(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    report = run(backbone(), replace(settings, k=(7, 30, 500)), tmp_path / "out")
    assert report.notes == ("k = 500 is more than the 30 images of the bank; all of them voted",)
    assert report.metrics["top1_k500"] == report.metrics["top1_k30"]


def test_few_shot_with_the_whole_bank_is_the_whole_bank(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    report = run(backbone(), replace(settings, few_shot=(1, 6, 100), tries=3), tmp_path / "out")
    for name in ("top1_few_shot_6", "top1_few_shot_100"):
        assert report.metrics[name].value == pytest.approx(report.metrics["top1"].value)
        assert report.metrics[name].std == pytest.approx(0)
    assert report.metrics["top1_few_shot_1"].value <= report.metrics["top1"].value + 15


def test_a_head_is_scored_in_its_own_space_under_its_own_name(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    report = run(backbone(), replace(settings, head="pair"), tmp_path / "out")
    assert report.settings["resolved"]["width"] == 2
    assert report.model == "pooled-pair-head"
    assert (tmp_path / "out" / "knn-pooled-pair-head.json").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_of_nan_gets_no_score(
    tmp_path: Path, settings: KnnSettings, backbone: Callable, value: float
) -> None:
    model = backbone()
    model.adaptors["pair"].adapt_summary = lambda summaries: summaries * value
    with pytest.raises(RadioError, match="pooled in the space of pair gives values that are not finite"):
        run(model, replace(settings, head="pair"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_in_one_task_leaves_the_next_as_it_was(tmp_path: Path, settings: KnnSettings) -> None:
    def score(*precisions: str) -> list[Any]:
        """The reports of one loaded model, task after task."""
        model = build(ModelConfig(student="vit-tiny12"), seed=1)
        out = tmp_path / "-".join(precisions) / "out"
        return [run(model, settings, out, precision=precision) for precision in precisions]

    half, full = score("bf16", "fp32")
    (alone,) = score("fp32")
    records = [(tmp_path / name / "out/knn-vit-tiny12.jsonl").read_text() for name in ("bf16-fp32", "fp32")]
    assert records[0] == records[1] and full.metrics == alone.metrics
    assert half.fingerprint == full.fingerprint == alone.fingerprint
    assert half.settings["resolved"]["dtype"] == "bfloat16"


def test_top5_is_absent_below_five_classes(
    tmp_path: Path, make_folder: Callable[..., Path], backbone: Callable
) -> None:
    bank = make_folder(tmp_path / "few", classes=4)
    report = run(backbone(), KnnSettings(bank=str(bank), leave_one_out=True), tmp_path / "out")
    assert "top5" not in report.metrics


def test_unreadable_images_are_left_out_and_reported(
    tmp_path: Path, settings: KnnSettings, backbone: Callable
) -> None:
    broken = Path(str(settings.query)) / "c1" / "101.png"
    Image.open(broken).save(broken.with_suffix(".jpg"))
    broken.unlink()
    data = broken.with_suffix(".jpg").read_bytes()
    broken.with_suffix(".jpg").write_bytes(data[: len(data) // 2])
    report = run(backbone(), settings, tmp_path / "out")
    assert report.data[1].count == 19
    assert [skipped.key for skipped in report.data[1].skipped] == ["c1/101.jpg"]
    assert "truncated" in report.data[1].skipped[0].reason
    assert read(tmp_path / "out" / "knn-pooled.json") == report


def test_grey_and_other_modes_are_just_images(
    tmp_path: Path, make_folder: Callable[..., Path], backbone: Callable
) -> None:
    root = make_folder(tmp_path / "d", classes=2, count=4)
    for number, mode in enumerate(("L", "CMYK", "RGBA", "P")):
        path = root / "c0" / f"{number:03d}.png"
        image = Image.open(path).convert(mode)
        image.save(path.with_suffix(".tif"))
        path.unlink()
    report = run(backbone(), KnnSettings(bank=str(root), leave_one_out=True), tmp_path / "out")
    assert report.data[0].count == 8
    assert report.data[0].skipped == ()


def test_the_generated_world_is_the_default(tmp_path: Path, backbone: Callable) -> None:
    report = run(backbone(), KnnSettings(scenes=(120, 60)), tmp_path / "out")
    assert [(used.name, used.count, used.num_classes) for used in report.data] == [
        ("scenes:train", 120, 60),
        ("scenes:val", 60, 60),
    ]


def test_one_class_is_an_error_before_any_work(
    tmp_path: Path, make_folder: Callable[..., Path], backbone: Callable
) -> None:
    model = backbone()
    root = make_folder(tmp_path / "one", classes=1)
    with pytest.raises(DataError, match="one class only, so every vote is right"):
        run(model, KnnSettings(bank=str(root), query=str(root)), tmp_path / "out")
    assert model.calls == 0
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_an_error(tmp_path: Path, settings: KnnSettings, backbone: Callable) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run(backbone(), replace(settings, query=str(tmp_path / "no")), tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown device"):
        run(backbone(), settings, tmp_path / "out", device="tpu")
    headless: Any = _Bare()
    with pytest.raises(ConfigError, match="has no adaptors"):
        run(headless, replace(settings, head="clip"), tmp_path / "out")


class _Bare:
    """A backbone without adaptors (the run ends before anything else is asked of it)."""

    adaptors = MappingProxyType({})
    name = "bare"
    fingerprint = "0"
    native_size = (32, 32)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": ()}, "one or more numbers"),
        ({"k": (0, 20)}, "each 1 or more"),
        ({"primary_k": 5}, "primary_k = 5 is not among"),
        ({"few_shot": (0,)}, "numbers of 1 or more"),
        ({"few_shot": (1,), "tries": 0}, "numbers of 1 or more"),
        ({"bank": "x"}, "give --query, or --leave-one-out"),
        ({"k": (99_999_999,)}, r"k\[0\]: 99999999 is out of bounds; .* at most 16384"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"temperature": -1.0}, "temperature: -1.0 is out of bounds; give a number above 0"),
        ({"ratio": 1e9}, "ratio: "),
        ({"ratio": float("nan")}, "ratio: nan"),
        ({"size": 10**6}, "size: 1000000"),
        ({"scenes": (10**12, 5)}, r"scenes\[0\]: "),
        ({"few_shot": (1,), "tries": 10**9}, "tries: "),
        ({"query": "x"}, "give --bank too"),
        ({"bank": "x", "query": "y", "leave_one_out": True}, "leave the query out"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        KnnSettings(**changes)


def _rank(rank: int, world: int, port: int, model: Backbone, settings: KnnSettings, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with joined():
        report = run(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps([m.value for m in report.metrics.values()]))


def test_two_ranks_write_the_report_of_one(tmp_path: Path, backbone: Callable, free_port: int) -> None:
    # More images than one chunk holds, so that both ranks extract and both hold a share.
    settings = KnnSettings(scenes=(540, 60), few_shot=(3,), tries=2)
    alone = run(backbone(), settings, tmp_path / "one" / "out")
    out = tmp_path / "two" / "out"
    out.mkdir(parents=True)
    multiprocessing.spawn(_rank, (2, free_port, backbone(), settings, out), nprocs=2, join=True)
    both = read(out / "knn-pooled.json")
    assert both.metrics == alone.metrics
    assert both.settings["resolved"]["ranks"] == 2
    wanted = [metric.value for metric in alone.metrics.values()]
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == wanted
    one, two = (tmp_path / "one/out/knn-pooled.jsonl"), (out / "knn-pooled.jsonl")
    keep = ("id", "predictions", "neighbour_ids")
    assert [[json.loads(line)[k] for k in keep] for line in one.read_text().splitlines()] == [
        [json.loads(line)[k] for k in keep] for line in two.read_text().splitlines()
    ]


def test_the_headline_is_twenty_or_the_first() -> None:
    assert KnnSettings().main_k == 20
    assert KnnSettings(k=(10, 50)).main_k == 10
    assert KnnSettings(k=(10, 50), primary_k=50).main_k == 50


def test_a_full_disk_leaves_records_and_report_as_they_were(
    tmp_path: Path, settings: KnnSettings, backbone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(backbone(), settings, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    done: list[int] = []

    def full(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) > 1:  # the records fit, the report does not
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(backbone(), replace(settings, k=(3,), primary_k=None), tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before

"""A small ROxford5k and the generated world: scores by slow loops, and data that cannot be scored."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing

from evals.core.blocks import Examples, Table
from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.reporting.compare import compare, read_reports
from evals.retrieval import RetrievalSettings
from evals.retrieval.data import EASY, make_scenes
from evals.retrieval.scores import chance
from radio.data import SceneViews
from radio.dist import joined
from radio.errors import ConfigError, DataError, MissingDataError
from radio.scenes import label_of, render_view
from radio.types import Backbone

from .test_scores import slow

TRUTH: dict[str, Any] = {
    "imlist": [f"im{number}" for number in range(8)],
    "qimlist": ["q0", "q1", "q2"],
    "gnd": [
        {"bbx": [2.2, 3.0, 18.0, 19.6], "easy": [0, 1], "hard": [2], "junk": [3]},
        {"bbx": [0, 0, 20, 20], "easy": [4], "hard": [], "junk": [0, 1]},
        {"bbx": [-3, 5, 40, 12], "easy": [], "hard": [6, 7], "junk": []},
    ],
}


def write_truth(folder: Path, truth: dict[str, Any]) -> None:
    (folder / "gnd_roxford5k.json").write_text(json.dumps(truth))


@pytest.fixture
def landmarks(tmp_path: Path) -> Path:
    """Eight images and three queries, in ROxford5k's layout."""
    folder = tmp_path / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*TRUTH["imlist"], *TRUTH["qimlist"]):
        coarse = generator.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((24, 20)).save(folder / "jpg" / f"{name}.jpg", quality=95)
    write_truth(folder, TRUTH)
    return folder


def score(model: Any, settings: RetrievalSettings, out: Path, **run: Any) -> Report:
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **run})
    return run_evaluator(make_evaluator("retrieval"), model, settings, out, run=shared)


def lines(report: Report, out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / report.records).read_text().splitlines()]


def encode(model: Any, path: Path, box: list[int] | None = None) -> torch.Tensor:
    """The summary of an image or a part of it, at the model's short side, by PIL."""
    image = Image.open(path)
    if box is not None:
        image = image.crop(box)
    factor = 32 / min(image.size)
    size = [max(8, round(int(side * factor + 1e-9) / 8) * 8) for side in image.size]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(pixels, size=size[::-1], mode="bicubic", antialias=True)
    return model(resized.clamp(0, 1)).summary[0]


def test_the_three_protocols_by_a_slow_loop(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]
) -> None:
    model = backbone()
    report = score(model, RetrievalSettings(data=landmarks), tmp_path / "o")
    boxes = [[2, 3, 18, 20], [0, 0, 20, 20], [0, 5, 24, 12]]
    database = torch.stack([encode(model, landmarks / "jpg" / f"{name}.jpg") for name in TRUTH["imlist"]])
    expected: dict[str, list[float]] = {}
    for query, (name, box) in enumerate(zip(TRUTH["qimlist"], boxes, strict=True)):
        vector = encode(model, landmarks / "jpg" / f"{name}.jpg", box)
        order = torch.cosine_similarity(vector[None], database).argsort(descending=True).tolist()
        easy, hard, junk = (set(TRUTH["gnd"][query][grade]) for grade in ("easy", "hard", "junk"))
        protocols = {"medium": (easy | hard, junk), "hard": (hard, easy | junk), "easy": (easy, hard | junk)}
        for protocol, (positive, ignored) in protocols.items():
            if positive:
                for k in (1, 5, 10):
                    ap, precision = slow(order, positive, ignored, k)
                    expected.setdefault(f"mp{k}_{protocol}", []).append(100 * precision)
                expected.setdefault(f"map_{protocol}", []).append(100 * ap)
    found = {name: metric.value for name, metric in report.metrics.items()}
    assert found == pytest.approx({name: np.mean(values) for name, values in expected.items()}, abs=1e-6)
    assert report.primary_metric == "map_medium"
    assert report.baselines == {
        "chance": pytest.approx(100 * np.mean([chance(7, 3), chance(6, 1), chance(8, 2)]))
    }
    records = lines(report, tmp_path / "o")
    assert [record["id"] for record in records] == ["000-q0", "001-q1", "002-q2"]
    assert 100 * np.mean([record["score"] for record in records]) == pytest.approx(found["map_medium"])
    shown = [set(record["images"]) for record in records]  # all but junk, of so few images
    assert shown == [set(TRUTH["imlist"]) - out for out in ({"im3"}, {"im0", "im1"}, set[str]())]
    assert [(data.role, data.count) for data in report.data] == [("database", 8), ("query", 3)]
    table, examples = report.blocks
    assert isinstance(table, Table) and [row[0] for row in table.rows] == ["medium", "hard", "easy"]
    assert isinstance(examples, Examples) and len(examples.examples) == 3
    worst = min(records, key=lambda record: record["score"])
    assert examples.examples[0].lines[0] == worst["id"] and len(examples.examples[0].others) == 5


def test_queries_without_positives_are_left_out(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]
) -> None:
    whole = score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")
    empty = {"bbx": [0, 0, 9, 9], "easy": [], "hard": [], "junk": [2]}
    write_truth(landmarks, {**TRUTH, "qimlist": ["q0", "q1", "q2", "q0"], "gnd": [*TRUTH["gnd"], empty]})
    report = score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "p")
    assert report.metrics == whole.metrics
    assert "queries left out since they have no positive: 1" in report.notes
    write_truth(landmarks, {**TRUTH, "gnd": [empty] * 3})
    with pytest.raises(DataError, match="roxford5k queries: no query has a positive that can be read"):
        score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "p")


def test_images_that_cannot_be_read_are_left_out(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]
) -> None:
    for name in ("im1", "q1"):
        (landmarks / "jpg" / f"{name}.jpg").write_bytes(b"no image")
    report = score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")
    assert [[skipped.key for skipped in data.skipped] for data in report.data] == [["im1"], ["001-q1"]]
    (first, second) = lines(report, tmp_path / "o")
    assert (first["id"], second["id"]) == ("000-q0", "002-q2")
    truth = json.loads(json.dumps(TRUTH).replace("[0, 1]", "[0]"))  # im1 out of everything
    good = [truth["gnd"][0]["easy"], truth["gnd"][0]["hard"]]
    order = [TRUTH["imlist"].index(name) for name in first["images"]]
    assert first["score"] == pytest.approx(slow(order, {*good[0], *good[1]}, {3}, 1)[0])


def test_a_box_outside_of_its_image_is_no_query(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]
) -> None:
    gnd = [{**TRUTH["gnd"][0], "bbx": [30, 0, 40, 9]}, *TRUTH["gnd"][1:]]
    write_truth(landmarks, {**TRUTH, "gnd": gnd})
    report = score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")
    (skipped,) = report.data[1].skipped
    assert skipped.reason == "its box [30, 0, 40, 9] is empty or outside of the image"


def test_few_queries_of_many_keep_the_database(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]
) -> None:
    whole = score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")
    part = score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "p", limit=2)
    assert [(data.role, data.count) for data in part.data] == [("database", 8), ("query", 2)]
    assert lines(part, tmp_path / "p") == lines(whole, tmp_path / "o")[:2]
    with pytest.raises(DataError, match="--limit 0 leaves no queries"):
        score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "p", limit=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gnd": TRUTH["gnd"][:2]}, r"gnd_roxford5k\.json: has 3 queries in qimlist and 2 in gnd"),
        ({"imlist": TRUTH["imlist"][:7]}, r"gnd\[2\] names the image 7 but imlist has 7 images"),
        ({"gnd": [{**TRUTH["gnd"][0], "junk": [1]}, *TRUTH["gnd"][1:]]}, r"gnd\[0\] names the image 1 twice"),
        (
            {"gnd": [{**TRUTH["gnd"][0], "bbx": [1, 2]}, *TRUTH["gnd"][1:]]},
            r"gnd\[0\]\.bbx: list should have",
        ),
        ({"imlist": [*TRUTH["imlist"][:7], "im0"]}, r"imlist names im0 twice; list each image once"),
        ({"imlist": ["../im0", *TRUTH["imlist"][1:]]}, r"names the image \.\./im0, which is not below jpg/"),
        ({"qimlist": ["/q0", "q1", "q2"]}, r"names the image /q0, which is not below jpg/"),
        ({"qimlist": []}, "qimlist: list should have at least 1 item"),
        ({"imlist": [*TRUTH["imlist"], "gone"]}, r"jpg/gone\.jpg: no such image \(1 of 9 are absent\)"),
    ],
)
def test_ground_truth_that_cannot_be(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any], change: dict[str, Any], said: str
) -> None:
    write_truth(landmarks, {**TRUTH, **change})
    with pytest.raises(DataError, match=said):
        score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")


def test_a_pickle_is_never_opened(tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]) -> None:
    """The command that the error names makes the very file."""
    truth = {**TRUTH, "gnd": [{**each, "bbx": np.array(each["bbx"])} for each in TRUTH["gnd"]]}
    pickled = landmarks / "gnd_roxford5k.pkl"
    (landmarks / "gnd_roxford5k.json").unlink()
    pickled.write_bytes(pickle.dumps(truth))
    with pytest.raises(
        DataError, match=r"gnd_roxford5k\.pkl: a pickle may run code when it is opened"
    ) as caught:
        score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")
    command = str(caught.value).split('python -c "')[1].removesuffix('"')
    assert "gnd_roxford5k.json" in command
    subprocess.run([sys.executable, "-c", command], cwd=landmarks, check=True)
    assert score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o").data[0].count == 8


def test_folders_without_one_ground_truth(
    tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]
) -> None:
    (landmarks / "gnd_rparis6k.json").write_text("{}")
    with pytest.raises(DataError, match=r"has gnd_roxford5k\.json and gnd_rparis6k\.json; keep one"):
        score(backbone(), RetrievalSettings(data=landmarks), tmp_path / "o")
    with pytest.raises(MissingDataError, match="wanted the folder of ROxford5k or RParis6k"):
        score(backbone(), RetrievalSettings(data=tmp_path / "nowhere"), tmp_path / "o")


def test_reports_are_called_by_the_ground_truth(
    tmp_path: Path, landmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = make_evaluator("retrieval").suffix
    monkeypatch.chdir(landmarks)
    (landmarks / "gnd_roxford5k.json").rename(landmarks / "gnd_other.json")
    assert suffix(RetrievalSettings(data=landmarks)) == suffix(RetrievalSettings(data=Path())) == "-other"
    (landmarks / "gnd_other.json").unlink()
    assert suffix(RetrievalSettings(data=Path())) == "-roxford5k" and suffix(RetrievalSettings()) == ""


def test_the_generated_twin_asks_for_objects_not_classes() -> None:
    benchmark = make_scenes(3, 2, seed=5, limit=None)
    assert benchmark.queries.keys == ("val/000000-0", "val/000001-0", "val/000002-0")
    assert benchmark.database.keys == tuple(
        f"val/{key}"
        for key in (
            "000000-1",
            "000000-2",
            "000001-1",
            "000001-2",
            "000002-1",
            "000002-2",
            "000003-0",
            "000004-0",
        )
    )
    grades = benchmark.grades(torch.tensor([2, 0]))
    assert grades.tolist() == [[0, 0, 0, 0, EASY, EASY, 0, 0], [EASY, EASY, 0, 0, 0, 0, 0, 0]]
    few = make_scenes(9, 9, seed=5, limit=4)
    assert (len(few.queries.keys), len(few.database.keys)) == (4, 12)
    source = benchmark.database
    assert isinstance(source, SceneViews)
    assert source.read(3).numpy().tobytes() == render_view(1, 2, split="val", seed=5).scene.image.tobytes()
    assert source.labels.tolist()[2:4] == [label_of(1, split="val", seed=5)] * 2
    assert source.fingerprint == make_scenes(3, 2, seed=5, limit=None).database.fingerprint
    others = [make_scenes(3, 2, seed=6, limit=None).database, benchmark.queries]
    assert source.fingerprint not in {each.fingerprint for each in others}


def test_scenes_are_the_default_and_batches_change_nothing(
    tmp_path: Path, backbone: Callable[..., Any]
) -> None:
    settings = RetrievalSettings(scenes=(70, 60))
    report = score(backbone(), settings, tmp_path / "o")
    again = score(backbone(), settings, tmp_path / "p", batch_size=3, cache=tmp_path / "other")
    assert again.metrics == report.metrics and lines(again, tmp_path / "p") == lines(report, tmp_path / "o")
    assert list(report.metrics) == ["map", "mp1", "mp5", "mp10"]
    # Ten objects share their class with another: 2 x 2 views and 1 distractor, or 1 x 2 views and 1.
    classes = [label_of(index, split="val", seed=0) for index in range(130)]
    of_class = [2 * classes[:70].count(c) + classes[70:].count(c) for c in classes[:70]]
    assert report.baselines == {
        "chance": pytest.approx(100 * chance(200, 2)),
        "class known": pytest.approx(100 * np.mean([chance(n, 2) for n in of_class])),
    }
    assert next(iter(report.baselines)) == "class known"  # the page shows the first
    (examples,) = report.blocks
    assert isinstance(examples, Examples) and len(examples.examples) == 6
    model = backbone()
    score(model, settings, tmp_path / "q")
    assert model.images == 0  # features are cached


def test_reports_are_compared_by_query(tmp_path: Path, landmarks: Path, backbone: Callable[..., Any]) -> None:
    for folder, seed in (("a", 0), ("b", 1)):
        score(backbone(seed=seed), RetrievalSettings(data=landmarks), tmp_path / folder)
    changes = {
        change.metric: change
        for change in compare(read_reports(tmp_path / "a"), read_reports(tmp_path / "b"), tolerance=0.5)
    }
    assert "map_medium" in changes and changes["map_medium"].paired


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"scenes": (0, 5)}, r"scenes\[0\]"), ({"scenes": (5, -1)}, r"scenes\[1\]"), ({"size": 0}, "size")],
)
def test_settings_out_of_range(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RetrievalSettings(**changes)


def _rank(rank: int, port: int, model: Backbone, settings: RetrievalSettings, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined():
        report = score(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps([m.value for m in report.metrics.values()]))


def test_two_ranks_write_the_report_of_one(
    tmp_path: Path, backbone: Callable[..., Any], free_port: int
) -> None:
    settings = RetrievalSettings(scenes=(20, 500))  # more images than one chunk holds
    alone = score(backbone(), settings, tmp_path / "one" / "out")
    out = tmp_path / "two" / "out"
    out.mkdir(parents=True)
    multiprocessing.spawn(_rank, (free_port, backbone(), settings, out), nprocs=2, join=True)
    assert read(out / "retrieval-pooled.json").metrics == alone.metrics
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == [
            m.value for m in alone.metrics.values()
        ]
    name = "retrieval-pooled.jsonl"
    assert (out / name).read_text() == (tmp_path / "one" / "out" / name).read_text()

"""A head for each data set: its choice and scores are scikit-learn's; other sets by it; calibration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from sklearn.linear_model import LogisticRegression as Reference
from torchmetrics.classification import MulticlassCalibrationError

from evals.core.blocks import Bars, Lines, Table
from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.features import Extraction, ViewSettings, extract, make_view
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.linear import LinearSettings
from evals.linear.evaluator import calibrate, predict
from evals.linear.solvers import Head, hold_out
from evals.reporting.compare import compare, read_reports
from radio.data import imagenet_numbers, open_source
from radio.dist import joined
from radio.errors import ConfigError, DataError, SizeError
from radio.types import Backbone

Make = Callable[..., Any]


def run(model: Any, settings: LinearSettings, out: Path, **changes: Any) -> Report:
    """Evaluate with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **changes})
    return run_evaluator(make_evaluator("linear"), model, settings, out, run=shared)


@pytest.fixture
def settings(tmp_path: Path, make_folder: Callable[..., Path]) -> LinearSettings:
    """Five classes, 60 images to train on and 30 to score, few penalties."""
    train = make_folder(tmp_path / "d" / "train", classes=5, count=12)
    val = make_folder(tmp_path / "d" / "val", classes=5, count=6, first=100)
    return LinearSettings(train=(str(train),), val=(str(val),), c=(0.001, 0.01, 0.1, 1.0, 100.0))


def features(model: Any, text: str, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    how = Extraction(view=make_view(model, ViewSettings())[0], device=torch.device("cpu"))
    stored = extract(model, open_source(text), how, cache=cache)
    return stored.features.double().numpy(), stored.labels.numpy()


def reference(x: np.ndarray, y: np.ndarray, c: float) -> Reference:
    return Reference(C=c, tol=1e-10, max_iter=10_000).fit(x, y)


def test_choice_and_scores_are_scikit_learns(
    tmp_path: Path, settings: LinearSettings, backbone: Make
) -> None:
    model = backbone(width=2)
    for text in (
        *settings.train,
        *settings.val,
    ):  # some are labelled wrong, so that there is something to choose
        for path in sorted((Path(text) / "c0").iterdir())[:3]:
            path.rename(Path(text) / "c1" / f"9{path.name}")
    report = run(model, settings, tmp_path / "out")
    x, y = features(model, settings.train[0], tmp_path / "cache")
    queries, truth = features(model, settings.val[0], tmp_path / "cache")
    rows, held = (part.numpy() for part in hold_out(torch.from_numpy(y), seed=0))
    tops = [reference(x[rows], y[rows], c).score(x[held], y[held]) for c in settings.c or ()]
    best = (settings.c or ())[int(np.argmax(tops))]
    assert report.settings["resolved"]["c"] == {"val": best}
    curve = report.blocks[0]
    assert isinstance(curve, Lines) and curve.x == settings.c and curve.log_x
    assert curve.y == pytest.approx([100 * top for top in tops])
    theirs = reference(x, y, best)
    assert report.metrics["top1"].value == pytest.approx(100 * theirs.score(queries, truth))
    assert 20 < report.metrics["top1"].value < 100  # hard enough to tell
    shares = torch.from_numpy(theirs.predict_proba(queries))
    error = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")(shares, torch.from_numpy(truth))
    assert report.metrics["ece"].value == pytest.approx(100 * float(error), abs=1e-3)
    lines = (tmp_path / "out" / "linear-pooled.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [int(record["predictions"][0][1:]) for record in records] == theirs.predict(queries).tolist()
    confidences = [record["confidence"] for record in records]
    assert confidences == pytest.approx(shares.amax(dim=1).tolist(), abs=1e-4)
    assert [record["id"] for record in records] == list(open_source(settings.val[0]).keys)
    assert read(tmp_path / "out" / "linear-pooled.json") == report
    assert [(used.role, used.count, used.scored) for used in report.data] == [
        ("train", 60, False),
        ("val", 30, True),
    ]
    assert report.notes == () and report.baselines == {"chance": 20.0}


def test_one_c_needs_no_choice(tmp_path: Path, settings: LinearSettings, backbone: Make) -> None:
    model = backbone()
    report = run(model, replace(settings, c=(0.05,)), tmp_path / "out")
    x, y = features(model, settings.train[0], tmp_path / "cache")
    queries, truth = features(model, settings.val[0], tmp_path / "cache")
    assert report.metrics["top1"].value == pytest.approx(100 * reference(x, y, 0.05).score(queries, truth))
    assert [block.title for block in report.blocks][:1] == ["reliability"]


def test_the_batch_size_and_a_second_run_change_nothing(
    tmp_path: Path, settings: LinearSettings, backbone: Make
) -> None:
    first = run(backbone(), settings, tmp_path / "one")
    model = backbone()
    again = run(model, settings, tmp_path / "two")
    assert again.metrics == first.metrics and model.calls == 0  # all from the cache, k-NN's too
    fresh = run(backbone(), settings, tmp_path / "three", batch_size=7, cache=tmp_path / "other")
    for name, metric in first.metrics.items():
        assert fresh.metrics[name].value == pytest.approx(metric.value, abs=1e-4)  # as the features round


def test_chosen_on_the_scored_images_the_best_of_all_is_taken_and_said(
    tmp_path: Path, settings: LinearSettings, backbone: Make
) -> None:
    report = run(backbone(), replace(settings, choose="scored"), tmp_path / "out")
    curve = report.blocks[0]
    assert isinstance(curve, Lines) and report.metrics["top1"].value == max(curve.y)
    best = report.settings["resolved"]["c"]["val"]
    assert curve.x[curve.y.index(max(curve.y))] == best  # the first of equals
    assert report.notes == ("the head was chosen on the images that it is scored on, as DINOv2 does",)


def test_sgd_has_heads_on_both_kinds_of_features(
    tmp_path: Path, settings: LinearSettings, backbone: Make
) -> None:
    short: Any = {"solver": "sgd", "iterations": 40, "train_batch_size": 16, "lr": (0.01, 0.1)}
    chosen = LinearSettings(train=settings.train, val=settings.val, **short)
    report = run(backbone(), chosen, tmp_path / "out")
    assert report.model == "pooled-sgd"
    lines = [block for block in report.blocks if isinstance(block, Lines)]
    curves = [block for block in lines if block.x_label == "learning rate"]
    assert [curve.x for curve in curves] == [(0.01, 0.1)] * 2
    kinds = [curve.title.rpartition(", ")[2] for curve in curves]
    assert kinds == ["summary", "summary + mean of the tokens"]
    assert report.metrics["top1"].value == max(y for curve in curves for y in curve.y) > 40
    assert report.notes[:2] == (
        "trained on cached features of one crop an image; DINOv2's crops are random",
        "the head was chosen on the images that it is scored on, as DINOv2 does",
    )
    apart = run(backbone(), replace(chosen, choose="held-out"), tmp_path / "apart")
    assert len(apart.notes) == 1 and apart.settings["resolved"]["lr"]["val"] in (0.01, 0.1)
    assert run(backbone(), chosen, tmp_path / "again").metrics == report.metrics
    other = run(backbone(), replace(chosen, head_seed=5), tmp_path / "other")
    assert other.metrics["ece"] != report.metrics["ece"]
    assert {"head_seed"} < set(other.machine_settings)


def test_fits_that_end_early_are_told(tmp_path: Path, settings: LinearSettings, backbone: Make) -> None:
    report = run(backbone(), replace(settings, max_iterations=2), tmp_path / "out")
    assert report.notes == ("d/train: 5 of 5 fits ended at --max-iterations, the chosen one too",)


def test_without_a_choice_no_note_speaks_of_one(
    tmp_path: Path, settings: LinearSettings, backbone: Make
) -> None:
    alone = replace(settings, c=(1.0,), choose="scored")
    assert run(backbone(), alone, tmp_path / "one").notes == ()
    report = run(backbone(), replace(alone, max_iterations=2), tmp_path / "two")
    assert report.notes == ("d/train: the fit ended at --max-iterations",)


@pytest.fixture
def imagenet(tmp_path: Path, make_folder: Callable[..., Path], settings: LinearSettings) -> LinearSettings:
    """The same images in folders of five WordNet ids."""
    ids = list(imagenet_numbers())
    for text in (*settings.train, *settings.val):
        for label in range(5):
            (Path(text) / f"c{label}").rename(Path(text) / ids[10 * label])
    return replace(settings, c=(0.01,))


def test_other_sets_are_scored_by_the_same_head_among_their_own_classes(
    tmp_path: Path, make_folder: Callable[..., Path], imagenet: LinearSettings, backbone: Make
) -> None:
    numbers = make_folder(tmp_path / "v2", classes=5, count=3, first=200)
    some = make_folder(tmp_path / "r", classes=3, count=4, first=300)
    for label in range(5):
        (numbers / f"c{label}").rename(numbers / str(10 * label))  # ImageNet-V2's layout
    for label, place in ((0, 0), (1, 10), (2, 20)):
        (some / f"c{label}").rename(some / list(imagenet_numbers())[place])  # ImageNet-R's
    model = backbone(width=2)
    report = run(model, replace(imagenet, also=(f"v2={numbers}", f"r={some}")), tmp_path / "out")
    x, y = features(model, imagenet.train[0], tmp_path / "cache")
    theirs = reference(x, y, 0.01)
    queries, _ = features(model, str(numbers), tmp_path / "cache")
    assert [used.role for used in report.data] == ["train", "val", "v2", "r"]
    truth = np.repeat(np.arange(5), 3)[np.argsort(np.repeat(["0", "10", "20", "30", "40"], 3), kind="stable")]
    assert report.metrics["top1_v2"].value == pytest.approx(100 * theirs.score(queries, truth))
    queries, truth = features(model, str(some), tmp_path / "cache")
    tops = theirs.decision_function(queries)[:, :3].argmax(axis=1)
    assert report.metrics["top1_r"].value == pytest.approx(100 * (tops == truth).mean())
    assert not np.array_equal(tops, theirs.predict(queries))  # the restriction tells
    (bars,) = [block for block in report.blocks if isinstance(block, Bars)]
    assert bars.names == ("val", "v2", "r") and bars.values[0] == report.metrics["top1"].value


def test_the_data_sets_own_images_are_scored_among_all_classes(
    tmp_path: Path, make_folder: Callable[..., Path], settings: LinearSettings, backbone: Make
) -> None:
    some = make_folder(tmp_path / "some", classes=3, count=8, first=300)
    model = backbone(width=2)
    report = run(model, replace(settings, val=(str(some),), c=(0.01,)), tmp_path / "out")
    x, y = features(model, settings.train[0], tmp_path / "cache")
    queries, truth = features(model, str(some), tmp_path / "cache")
    theirs = reference(x, y, 0.01)
    assert report.metrics["top1"].value == pytest.approx(100 * theirs.score(queries, truth))
    assert theirs.predict(queries).max() > 2 and report.baselines == {"chance": 20.0}


def test_a_class_that_the_head_does_not_know(
    tmp_path: Path, make_folder: Callable[..., Path], imagenet: LinearSettings, backbone: Make
) -> None:
    other = make_folder(tmp_path / "other", classes=2)
    model = backbone()
    with pytest.raises(DataError, match="other has 2 classes that d/train lacks, the first is 'c0'"):
        run(model, replace(imagenet, also=(f"o={other}",)), tmp_path / "out")
    (other / "c0").rename(other / "0")
    (other / "c1").rename(other / "1")
    with pytest.raises(DataError, match="other has 1 classes that d/train lacks, the first is '1'"):
        run(model, replace(imagenet, also=(f"o={other}",)), tmp_path / "out")
    assert model.calls == 0


def test_several_data_sets_have_a_head_each_and_their_mean(
    tmp_path: Path, make_folder: Callable[..., Path], settings: LinearSettings, backbone: Make
) -> None:
    train = make_folder(tmp_path / "e" / "train", classes=3, count=8, first=400)
    val = make_folder(tmp_path / "e" / "val", classes=3, count=7, first=500)
    both = LinearSettings(
        train=(f"five={settings.train[0]}", f"three={train}"),
        val=(f"three={val}", f"five={settings.val[0]}"),
        c=settings.c,
    )
    report = run(backbone(), both, tmp_path / "out")
    five = run(backbone(), settings, tmp_path / "five")
    three = run(backbone(), replace(settings, train=(str(train),), val=(str(val),)), tmp_path / "three")
    tops = [each.metrics["top1"] for each in (five, three)]
    assert report.metrics["top1_five"] == tops[0] and report.metrics["top1_three"] == tops[1]
    mean = report.metrics["top1"]
    assert report.primary_metric == "top1" and mean.value == pytest.approx(sum(m.value for m in tops) / 2)
    below = [m.value - float(m.low or 0) for m in tops]
    assert mean.value - float(mean.low or 0) == pytest.approx(np.hypot(*below) / 2)
    assert report.baselines == {"chance": pytest.approx((100 / 5 + 100 / 3) / 2)}
    (table,) = [block for block in report.blocks if isinstance(block, Table)]
    assert [row[0] for row in table.rows] == ["five", "three"]
    assert [used.role for used in report.data] == [
        *("train of five", "val of five", "train of three", "val of three"),
    ]
    assert report.files == ("linear-pooled.jsonl",)
    run(backbone(seed=1), both, tmp_path / "base", cache=tmp_path / "cache")
    (change, *_) = compare(read_reports(tmp_path / "base"), read_reports(tmp_path / "out"), tolerance=1)
    assert (change.metric, change.paired) == ("top1", True)


def test_the_generated_world_is_the_default_and_its_domains_are_scored_by_the_same_head(
    tmp_path: Path, backbone: Make
) -> None:
    report = run(backbone(), LinearSettings(scenes=(240, 60, 40), c=(0.1,)), tmp_path / "out")
    assert [(used.role, used.count) for used in report.data] == [
        *(("train", 240), ("val", 60), ("night", 40), ("web", 40)),
    ]
    lines = (tmp_path / "out" / "linear-pooled.jsonl").read_text().splitlines()
    first = 100 * np.mean([json.loads(line)["score"] for line in lines[:40]])
    tops = [report.metrics[f"top1_{domain}"].value for domain in ("night", "web")]
    drop = report.metrics["drop"]
    assert drop.value == pytest.approx(first - np.mean(tops)) and drop.higher_is_better is False
    assert drop.low is not None and drop.high is not None and drop.low <= drop.value <= drop.high
    none = run(backbone(), LinearSettings(scenes=(240, 60, 40), c=(0.1,), domains=()), tmp_path / "none")
    assert "drop" not in none.metrics and none.metrics["top1"] == report.metrics["top1"]
    few = run(backbone(), LinearSettings(c=(0.1,)), tmp_path / "few", limit=30)
    assert [used.count for used in few.data] == [30, 30, 30, 30]


def test_calibration_by_hand() -> None:
    """Three of four right at 0.9, one of two at 0.55, none at 0.2: |3.6 - 3| + |1.1 - 1| + 0.2 of 7."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.55, 0.55, 0.2], dtype=torch.float64)
    correct = torch.tensor([True, True, True, False, True, False, False])
    error, lines = calibrate(confidence, correct)
    assert error.value == pytest.approx(100 * (0.6 + 0.1 + 0.2) / 7) and error.higher_is_better is False
    assert lines.x == pytest.approx((20, 55, 90)) and lines.y == pytest.approx((0, 50, 75))
    sure, _ = calibrate(torch.ones(3), torch.tensor([True, True, False]))
    assert sure.value == pytest.approx(100 / 3)


def test_calibration_is_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = (3 * torch.randn(500, 10, generator=generator)).softmax(dim=1).double()
    labels = torch.randint(10, (500,), generator=generator)
    confidence, tops = shares.max(dim=1)
    theirs = MulticlassCalibrationError(num_classes=10, n_bins=15, norm="l1")(shares, labels)
    error, _ = calibrate(confidence, tops == labels)
    assert error.value / 100 == pytest.approx(float(theirs), abs=1e-6)


def test_ties_go_to_the_lower_class_and_other_classes_are_left_out() -> None:
    head = Head(torch.eye(4), torch.zeros(4))
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 2.0, 2.0]])
    ranking, confidence = predict(head, x, torch.arange(4))
    assert ranking.tolist() == [[0, 1, 2, 3, -1], [1, 2, 3, 0, -1]]
    assert float(confidence[0]) == pytest.approx(0.25)
    ranking, confidence = predict(head, x, torch.tensor([3, 2]))
    assert ranking.tolist() == [[2, 3, -1, -1, -1], [2, 3, -1, -1, -1]]
    assert confidence.tolist() == pytest.approx([0.5, 0.5])


def test_what_cannot_be_trained_on(
    tmp_path: Path, make_folder: Callable[..., Path], settings: LinearSettings, backbone: Make
) -> None:
    one = make_folder(tmp_path / "one", classes=1)
    with pytest.raises(DataError, match="one: holds one class only, so every answer is right"):
        run(backbone(), replace(settings, train=(str(one),)), tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        run(backbone(), replace(settings, val=(str(tmp_path / "no"),)), tmp_path / "out")
    broken = make_folder(tmp_path / "broken", classes=2, count=1)
    (broken / "c1" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken: one image that can be read is too few; give two or more"):
        run(backbone(), replace(settings, train=(str(broken),), val=(str(broken),)), tmp_path / "out")


def test_the_memory_is_looked_at_before_any_image(
    tmp_path: Path, settings: LinearSettings, backbone: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.linear.solvers.memory_of", lambda device: 10**6)
    model = backbone()
    with pytest.raises(SizeError, match="a linear head for 5 classes on 60 x 24 features takes "):
        run(model, settings, tmp_path / "out")
    assert model.calls == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": ("a",)}, "--train has a and --val none; give both for every data set"),
        ({"train": ("a=x", "b=y"), "val": ("a=x", "c=y")}, "--train has a, b and --val a, c"),
        ({"train": ("x", "y"), "val": ("x", "y")}, "--train x y: several data sets need a name"),
        ({"train": ("a=x", "a=y"), "val": ("a=x", "a=y")}, "a name of their own each: NAME=FOLDER"),
        ({"train": ("a=x", "y"), "val": ("a=x", "y")}, "several data sets need a name"),
        ({"also": ("x",)}, "--also x: wanted NAME=FOLDER, such as v2=x"),
        *(
            (
                {"train": ("x",), "val": ("y",), "also": (f"{name}=z",)},
                f"--also {name}=…: the report's own names",
            )
            for name in ("train", "val", "night", "web", "mixture")
        ),
        (
            {"train": ("a=x", "b=y"), "val": ("a=x", "b=y"), "also": ("v=z",)},
            "--also is scored with one head; give one --train, or leave --also out",
        ),
        ({"train": ("x",), "val": ("y",), "domains": ("night",)}, "--domains are of the generated world"),
        ({"scenes": (10, 10, 20)}, "the third are some of the second in each domain"),
        ({"lr": (0.1,)}, "--lr is of --solver sgd; leave one of them out"),
        ({"solver": "sgd", "max_iterations": 5}, "--max-iterations is of --solver logreg"),
        ({"c": ()}, "--c : give one or more different values"),
        ({"c": (1.0, 1.0)}, "--c 1.0 1.0: give one or more different values"),
        ({"c": (0.0,)}, "c"),
        ({"c": (1e300,)}, r"c\[0\]: 1e\+300 is out of bounds"),
        ({"c": (1e-300,)}, r"c\[0\]: 1e-300 is out of bounds"),
        ({"solver": "sgd", "lr": (-1.0,)}, "lr"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LinearSettings(**changes)


def test_an_equals_sign_in_a_path_is_no_name() -> None:
    assert LinearSettings(train=("/d/a=b",), val=("/d/c=d",)).splits == {"": ("/d/a=b", "/d/c=d")}


def test_another_seed_for_each_repetition() -> None:
    evaluator = make_evaluator("linear")
    assert evaluator.with_seed is not None
    assert evaluator.with_seed(LinearSettings(), RunSettings(seed=3), 2).head_seed == 5
    assert evaluator.with_seed(LinearSettings(head_seed=1), RunSettings(seed=3), 2).head_seed == 3


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from evals.cli import main

    with pytest.raises(SystemExit):
        main(["linear", "--help"])
    text = capsys.readouterr().out
    for field in fields(LinearSettings):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert "DINOv2's 45" in text and "ImageNet-V2" in text


def _rank(rank: int, world: int, port: int, model: Backbone, settings: LinearSettings, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with joined():
        report = run(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps([m.value for m in report.metrics.values()]))


def test_two_ranks_write_the_report_of_one(
    tmp_path: Path, settings: LinearSettings, backbone: Make, free_port: int
) -> None:
    alone = run(backbone(), settings, tmp_path / "one" / "out")
    out = tmp_path / "two" / "out"
    out.mkdir(parents=True)
    multiprocessing.spawn(_rank, (2, free_port, backbone(), settings, out), nprocs=2, join=True)
    both = read(out / "linear-pooled.json")
    assert both.metrics == alone.metrics and both.settings["resolved"]["ranks"] == 2
    wanted = [metric.value for metric in alone.metrics.values()]
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == wanted
    one, two = tmp_path / "one/out/linear-pooled.jsonl", out / "linear-pooled.jsonl"
    assert one.read_text() == two.read_text()

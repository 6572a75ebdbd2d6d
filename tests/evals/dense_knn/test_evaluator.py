from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, multiprocessing

from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator, settings_on
from evals.dense_knn import DenseKnnSettings, choose_voc_split
from evals.dense_knn.evaluator import Votes, _upsample
from evals.seg_probe.classes import KNOWN_CLASSES
from evals.seg_probe.data import VOID, read_image, read_labels
from evals.seg_probe.layouts import open_dataset
from evals.seg_probe.protocol import SegSettings
from radio.datasets import DataSets
from radio.dist import joined
from radio.errors import ConfigError, DataError, RadioError, SizeError
from radio.images import resize
from radio.types import Features


def run(model: Any, settings: DenseKnnSettings, out: Path, **changes: Any) -> Report:
    """Evaluate on the CPU, with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **changes})
    return run_evaluator(make_evaluator("dense-knn"), model, settings, out, run=shared)


@pytest.fixture
def settings(tmp_path: Path, make_ade: Callable) -> DenseKnnSettings:
    return DenseKnnSettings(data=make_ade(tmp_path / "mine"), size=56, save_maps=0)


@pytest.mark.parametrize(
    ("lists", "split"), [(("trainaug",), "trainaug"), (("aug",), "trainaug"), ((), "train")]
)
def test_the_memory_of_voc_is_trainaugs_where_it_is_listed(
    tmp_path: Path, make_voc: Callable, patches: Callable, lists: tuple[str, ...], split: str
) -> None:
    keys = {"train": ["a", "b"], "val": ["c"]} | {name: ["a", "b", "d"] for name in lists}
    root = make_voc(tmp_path / "voc", keys, augmented=("d",))
    assert settings_on(make_evaluator("dense-knn"), DenseKnnSettings(), DataSets(voc=root)) == {
        "voc": DenseKnnSettings(data=root, voc_split=split)
    }
    assert settings_on(make_evaluator("seg"), SegSettings(), DataSets(voc=root))["voc"].voc_split == "train"
    report = run(patches(), DenseKnnSettings(data=root, size=56, save_maps=0), tmp_path / "out")
    assert [(used.name, used.count) for used in report.data] == [
        (f"VOC2012/{split}", 3 if lists else 2),
        ("VOC2012/val", 1),
    ]
    note = "the memory is of VOC2012's train; the published protocol takes SBD's trainaug"
    assert (note in report.notes) == (split == "train")
    named = replace(DenseKnnSettings(), data=root, voc_split="train")
    assert choose_voc_split(named) == "train"


def values(report: Report) -> list[float]:
    return [metric.value for metric in report.metrics.values()]


def areas_of(out: Path) -> list[Any]:
    return [
        json.loads(line)["areas"] for line in (out / "dense-knn-patches14.jsonl").read_text().splitlines()
    ]


def enlarged(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarge [C, h, w] bilinearly with pixels' centres as positions, pixel by pixel."""
    height, width = plane.shape[1:]
    out = np.zeros((plane.shape[0], *size))
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(v), int(u)
            low, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = v - top, u - left
            out[:, y, x] = (1 - a) * ((1 - b) * plane[:, top, left] + b * plane[:, top, right]) + a * (
                (1 - b) * plane[:, low, left] + b * plane[:, low, right]
            )
    return out


def shares_by_loop(labels: np.ndarray, side: int) -> np.ndarray:
    """The shares of three classes in 3 x 3 patches of 14 px: [9, 3]."""
    counts = np.zeros((9, 3))
    for y in range(42):
        for x in range(42):
            # the label's pixel in whose area the centre of this one lies
            label = labels[int((y + 0.5) * labels.shape[0] / 42), int((x + 0.5) * labels.shape[1] / 42)]
            if label != VOID:
                counts[3 * (y // side) + x // side, label] += 1
    return counts / side**2


def predict_by_loop(tokens: np.ndarray, search: Any, shares: np.ndarray, temperature: float) -> np.ndarray:
    """The votes [3, 3, 3] of the neighbours of the tokens [9, D]."""
    distances, ids = search.kneighbors(tokens)
    votes = np.zeros((3, 9))
    for token in range(9):
        weights = np.exp((1 - distances[token].astype(np.float64)) / temperature)
        for weight, id in zip(weights / weights.sum(), ids[token], strict=True):
            votes[:, token] += weight * shares[id]
    return votes.reshape(3, 3, 3)


def scores_by_loop(model: Any, root: Path, k: int, temperature: float) -> tuple[list[Any], float]:
    """The areas of each validation image and the mIoU, with scikit-learn's neighbours and loops in numpy."""
    data = open_dataset(root, voc_split=None, known=KNOWN_CLASSES)

    def tokens_of(pair: Any) -> np.ndarray:
        return model(resize(read_image(pair), (42, 42)).unsqueeze(0)).tokens[0].numpy()

    tokens = np.concatenate([tokens_of(pair) for pair in data.train.pairs])
    labels = [read_labels(pair.labels, data.labelling) for pair in data.train.pairs]
    shares = np.concatenate([shares_by_loop(each, 14) for each in labels])
    known = shares.any(axis=1)
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(tokens[known])
    lines, sums = [], np.zeros((3, 3))
    for pair in data.val.pairs:
        votes = predict_by_loop(tokens_of(pair), search, shares[known], temperature)
        truth = read_labels(pair.labels, data.labelling)
        classes, line = enlarged(votes, truth.shape).argmax(axis=0), []
        for number in range(3):
            seen, there = (classes == number) & (truth != VOID), truth == number
            row = [int((seen & there).sum()), int(seen.sum()), int(there.sum())]
            sums[number] += row
            line += [[number, *row]] if seen.any() or there.any() else []
        lines.append(line)
    iou = [100 * both / (seen + there - both) for both, seen, there in sums]
    return lines, float(np.mean(iou))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.02), (7, 0.02), (30, 0.5)])
def test_scores_are_those_of_a_slow_loop(
    tmp_path: Path, make_ade: Callable, patches: Callable, k: int, temperature: float
) -> None:
    root = make_ade(tmp_path / "mine", sizes=((40, 56), (56, 40)))
    settings = DenseKnnSettings(data=root, size=42, save_maps=0, k=k, temperature=temperature)
    report = run(patches(), settings, tmp_path / "out")
    lines, miou = scores_by_loop(patches(), root, k, temperature)
    assert areas_of(tmp_path / "out") == lines
    assert report.metrics["miou"].value == pytest.approx(miou, abs=1e-6)
    assert miou < 95  # something to get wrong


def test_an_image_that_is_remembered_has_its_own_labels(
    tmp_path: Path, make_ade: Callable, patches: Callable
) -> None:
    root = make_ade(tmp_path / "mine", sizes=((56, 56),))
    for kind in ("images", "annotations"):
        shutil.rmtree(root / kind / "training")
        shutil.copytree(root / kind / "validation", root / kind / "training")
    report = run(patches(), DenseKnnSettings(data=root, size=56, k=1, temperature=1e-3), tmp_path / "out")
    assert values(report) == [100, 100, 100]  # stripes end where patches do
    assert [len(each.images) for each in report.blocks[-1].rows] == [3]


def test_a_report_says_everything(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = patches(), tmp_path / "out"
    report = run(model, replace(settings, size=60, memory=44, save_maps=2), out)
    assert capfd.readouterr() == ("", "")
    assert read(out / "dense-knn-patches14.json") == report
    assert (report.task, report.primary_metric, report.pairing) == ("dense-knn", "miou", "mean_iou")
    resolved = report.settings["resolved"]
    assert resolved["size"] == [56, 56] and resolved["grid"] == [4, 4]
    assert resolved["memory"] == 44 and resolved["patches_per_image"] == [5, 6]
    assert report.notes[0] == "60 px was asked for; patches14 takes 56x56, which was used"
    assert [(info.role, info.scored, info.count) for info in report.data] == [
        ("train", False, 8),
        ("val", True, 4),
    ]
    assert all((out / name).is_file() for name in report.files)
    assert sum(name.endswith("-overlay.png") for name in report.files) == 2
    table = report.blocks[0]
    assert [row[0] for row in table.rows] == ["red", "green", "blue"]


def test_scores_do_not_depend_on_batches_and_are_kept(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable
) -> None:
    settings = replace(settings, memory=50)
    whole = run(patches(), settings, tmp_path / "whole", cache=tmp_path / "one")
    model = patches()
    assert values(run(model, settings, tmp_path / "single", batch_size=1)) == values(whole)
    assert areas_of(tmp_path / "single") == areas_of(tmp_path / "whole")
    assert len(model.sizes) == 1 + 12
    again = patches()
    assert values(run(again, settings, tmp_path / "again")) == values(whole)
    assert len(again.sizes) == 1  # the grid
    assert values(run(patches(), settings, tmp_path / "seed", seed=1)) != values(whole)


def test_a_stopped_run_is_continued(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evals.dense_knn import memory
    from evals.seg_probe import areas

    monkeypatch.setattr(memory, "CHUNK", 3)
    monkeypatch.setattr(areas, "CHUNK", 3)
    alone = run(patches(), settings, tmp_path / "alone", cache=tmp_path / "one")
    model = patches()
    model.fail_after = 1 + 7
    with pytest.raises(KeyboardInterrupt):
        run(model, settings, tmp_path / "out", batch_size=1)
    model = patches()
    report = run(model, settings, tmp_path / "out", batch_size=1)
    assert len(model.sizes) == 1 + 2 + 4
    assert report.metrics == alone.metrics


def _rank(rank: int, world: int, port: int, model: Any, settings: DenseKnnSettings, out: Path) -> None:
    from evals.dense_knn import memory
    from evals.seg_probe import areas

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    memory.CHUNK = areas.CHUNK = 3
    with joined():
        report = run(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps(values(report)))


def test_two_ranks_score_as_one(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable, free_port: int
) -> None:
    settings = replace(settings, memory=50, save_maps=1)
    alone = run(patches(), settings, tmp_path / "alone", cache=tmp_path / "one")
    out = tmp_path / "ranks"
    out.mkdir()
    multiprocessing.spawn(_rank, (2, free_port, patches(), settings, out), nprocs=2, join=True)
    both = read(out / "dense-knn-patches14.json")
    assert both.settings["resolved"]["ranks"] == 2
    assert both.metrics == alone.metrics
    assert areas_of(out) == areas_of(tmp_path / "alone")
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == values(both)


def test_a_compressed_memory_scores_alike(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable
) -> None:
    exact = run(patches(), settings, tmp_path / "exact")
    compressed = run(patches(), replace(settings, index="compressed"), tmp_path / "compressed")
    assert values(compressed) == pytest.approx(values(exact), abs=3)


def test_of_equal_votes_the_lower_class_wins() -> None:
    plane = torch.tensor([0.2, 0.4, 0.4, 0.0]).view(4, 1, 1).expand(4, 2, 3)
    assert (_upsample(plane.contiguous(), (5, 7)) == 1).all()
    halves = torch.stack([torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])])  # class 1, then class 0
    assert _upsample(halves, (1, 3)).tolist() == [[1, 0, 0]]  # the middle pixel has equal votes


def test_a_rerun_searches_no_neighbours(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(patches(), replace(settings, save_maps=2), tmp_path / "first")
    monkeypatch.setattr(Votes, "__call__", lambda *_: 1 / 0)
    again = run(patches(), replace(settings, save_maps=2), tmp_path / "again")
    assert again.metrics == first.metrics and len(again.files) == 5  # records, 2 maps, 2 overlays
    for name in first.files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    with pytest.raises(ZeroDivisionError):
        run(patches(), replace(settings, save_maps=1), tmp_path / "other")


class Odd:
    """Gives tokens that are not finite."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def to(self, *_: Any) -> Odd:
        return self

    def eval(self) -> Odd:
        return self

    def __call__(self, images: Tensor) -> Features:
        features = self._inner(images)
        return features._replace(tokens=features.tokens / 0)


def test_bad_input_is_one_error(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, message in (
        ({"temperature": 0.0}, "temperature"),
        ({"k": 0}, "k"),
        ({"memory": 0}, "memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(settings, **changes)
    with pytest.raises(DataError, match=r"neither ADE20K .* nor VOC2012"):
        run(patches(), replace(settings, data=tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="--voc-split train is of VOC2012; leave it out"):
        run(patches(), replace(settings, voc_split="train"), tmp_path / "out")
    with pytest.raises(RadioError, match="patches14 gives values that are not finite"):
        run(Odd(patches()), settings, tmp_path / "out")
    monkeypatch.setattr("evals.dense_knn.memory.memory_of", lambda device: 1000)
    with pytest.raises(SizeError, match=r"give a smaller --memory, or --index compressed"):
        run(patches(), settings, tmp_path / "out")


@pytest.mark.slow
def test_the_generated_world_is_the_default(tmp_path: Path, patches: Callable) -> None:
    report = run(patches(12), DenseKnnSettings(scenes=(20, 6), save_maps=0), tmp_path / "out")
    assert report.settings["resolved"]["size"] == [96, 96]
    assert report.data[1].num_classes == 11


def test_a_memory_without_a_labelled_patch_is_an_error(
    tmp_path: Path, settings: DenseKnnSettings, patches: Callable
) -> None:
    for path in sorted((settings.data / "annotations" / "training").iterdir())[-1:]:
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    with pytest.raises(DataError, match=r"no labelled patch was drawn from mine/training; give a larger"):
        run(patches(), replace(settings, memory=1), tmp_path / "out")  # of the last image

"""A small SPair-71k and the generated world: PCK by a slow loop, and data that cannot be scored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing

from evals.core.blocks import Table
from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.correspondence import CorrespondenceSettings
from evals.correspondence import data as data_module
from evals.correspondence.data import make_scenes, open_spair
from evals.reporting.compare import compare, read_reports
from radio.dist import joined
from radio.errors import ConfigError, DataError, MissingDataError, RadioError
from radio.scenes import SHAPES, move_points, render_view
from radio.types import Backbone, Features

SIZES = {"cat": [(30, 20), (24, 32), (40, 40)], "bus": [(32, 18), (20, 20), (26, 30)]}


@pytest.fixture
def spair(tmp_path: Path) -> Path:
    """Two classes of three images and six pairs each, in SPair-71k's layout."""
    folder, generator, number = tmp_path / "SPair-71k", np.random.default_rng(0), 0
    (folder / "PairAnnotation" / "test").mkdir(parents=True)
    for category, sizes in SIZES.items():
        (folder / "JPEGImages" / category).mkdir(parents=True)
        for image, size in enumerate(sizes):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3)).astype(np.uint8))
            coarse.resize(size).save(folder / "JPEGImages" / category / f"{image}.jpg", quality=95)
        for source, target in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
            number += 1
            count = 2 + number % 3
            (a, b), (left, top) = (sizes[source], sizes[target]), generator.integers(1, 6, 2).tolist()
            annotation = {
                "filename": f"{number:06d}-{source}-{target}:{category}",
                "src_imname": f"{source}.jpg",
                "trg_imname": f"{target}.jpg",
                "src_imsize": [*a, 3],
                "trg_imsize": [*b, 3],
                "trg_bndbox": [left, top, left + 40, top + 30],
                "category": category,
                "src_kps": (generator.random((count, 2)) * a).astype(int).tolist(),
                "trg_kps": (generator.random((count, 2)) * b).astype(int).tolist(),
                "viewpoint_variation": number % 2,
                "mirror": 0,
            }
            path = folder / "PairAnnotation" / "test" / f"{annotation['filename']}.json"
            path.write_text(json.dumps(annotation))
    return folder


def annotations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "PairAnnotation" / "test").iterdir())]


def change(folder: Path, number: int, **changes: Any) -> None:
    path = sorted((folder / "PairAnnotation" / "test").iterdir())[number]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def score(model: Any, settings: CorrespondenceSettings, out: Path, **run: Any) -> Report:
    shared = RunSettings(**{"cache": out.parent / "cache", "device": "cpu", **run})
    return run_evaluator(make_evaluator("correspondence"), model, settings, out, run=shared)


def values(report: Report) -> dict[str, float]:
    return {name: metric.value for name, metric in report.metrics.items()}


def lines(report: Report, out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / report.records).read_text().splitlines()]


class Patches:
    """A backbone whose tokens are the mean colours of patches of 8 px."""

    native_size, token_dim, summary_dim, patch_size, fixed_size = (32, 32), 3, 3, 8, False
    name = "patches"
    metadata = adaptors = MappingProxyType({})
    text = weights_file = window = with_window = intermediate = sam = None
    num_blocks = 0
    fingerprint = "patches"

    def __init__(self) -> None:
        self.images = 0

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        return max(8, round(height / 8) * 8), max(8, round(width / 8) * 8)

    def to(self, device: torch.device, dtype: torch.dtype) -> Patches:
        return self

    def eval(self) -> Patches:
        return self

    def __call__(self, images: torch.Tensor) -> Features:
        self.images += len(images)
        pooled = torch.nn.functional.avg_pool2d(images - 0.4, 8)
        return Features(pooled.mean(dim=(2, 3)), pooled.flatten(2).transpose(1, 2), tuple(pooled.shape[2:]))


def slow_errors(folder: Path, side: int) -> list[tuple[dict[str, Any], list[float]]]:
    """Every pair's distances in units of the box's longer side, by loops over points and tokens."""
    found = []
    for pair in annotations(folder):
        maps, squares = [], []
        for name in (pair["src_imname"], pair["trg_imname"]):
            image = Image.open(folder / "JPEGImages" / pair["category"] / name)
            square = Image.new("RGB", (max(image.size),) * 2, (255, 255, 255))
            square.paste(image)
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255
            resized = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
            tokens = torch.nn.functional.avg_pool2d(resized.clamp(0, 1) - 0.4, 8)
            maps.append(torch.nn.functional.normalize(tokens, dim=1))
            squares.append(max(image.size))
        left, top, right, bottom = pair["trg_bndbox"]
        errors = []
        for point, truth in zip(pair["src_kps"], pair["trg_kps"], strict=True):
            place = torch.tensor(point).float() / squares[0] * 2 - 1
            asked = torch.nn.functional.grid_sample(
                maps[0], place[None, None, None], padding_mode="border", align_corners=False
            )[0, :, 0, 0]
            cosines = (maps[1][0] * asked[:, None, None]).sum(0)
            row, column = divmod(int(cosines.argmax()), cosines.shape[1])
            x, y = ((place + 0.5) / cosines.shape[1] * squares[1] for place in (column, row))
            off = float(np.hypot(x - truth[0], y - truth[1]))
            errors.append(off / max(right - left, bottom - top))
        found.append((pair, errors))
    return found


def slow_pck(pairs: list[tuple[dict[str, Any], list[float]]], threshold: float) -> float:
    """The mean over the classes of the share of points that are found."""
    shares = []
    for category in SIZES:
        hits = [
            error <= threshold for pair, errors in pairs for error in errors if pair["category"] == category
        ]
        shares += [100 * np.mean(hits)] if hits else []
    return float(np.mean(shares))


def test_pck_by_a_slow_loop(tmp_path: Path, spair: Path) -> None:
    report = score(Patches(), CorrespondenceSettings(data=spair, size=64), tmp_path / "o")
    pairs = slow_errors(spair, 64)
    expected = {f"pck_{threshold}": slow_pck(pairs, threshold) for threshold in (0.1, 0.05, 0.2)}
    for view in (0, 1):
        of_view = [each for each in pairs if each[0]["viewpoint_variation"] == view]
        expected[f"pck_0.1_view{view}"] = slow_pck(of_view, 0.1)
    assert values(report) == pytest.approx(expected, abs=1e-6) and expected["pck_0.2"] > 0
    assert report.primary_metric == "pck_0.1"
    records = lines(report, tmp_path / "o")
    flat = [
        (pair, error) for pair, errors in sorted(pairs, key=lambda p: p[0]["category"]) for error in errors
    ]
    assert [record["part"] for record in records] == [pair["category"] for pair, _ in flat]
    assert [record["unit"] for record in records] == [pair["filename"] for pair, _ in flat]
    assert [record["error"] for record in records] == pytest.approx([error for _, error in flat], abs=1e-5)
    by_class = [np.mean([r["score"] for r in records if r["part"] == c]) for c in SIZES]
    assert 100 * np.mean(by_class) == pytest.approx(expected["pck_0.1"])
    (table,) = report.blocks
    assert isinstance(table, Table) and [row[:2] for row in table.rows] == [("bus", 6), ("cat", 6)]
    assert (report.data[0].count, report.data[0].num_classes) == (6, 2)
    assert report.settings["resolved"]["size"] == [64, 64] and 0 < report.baselines["chance"] < 100


def test_the_published_size_is_the_default(tmp_path: Path, spair: Path) -> None:
    settings = CorrespondenceSettings(data=spair, pairs_per_class=1)
    report = score(Patches(), settings, tmp_path / "o")
    assert report.settings["resolved"] == report.settings["resolved"] | {"size": [800, 800], "upsample": 1}
    evaluator = make_evaluator("correspondence")
    assert evaluator.input_size is not None
    assert evaluator.input_size(Patches(), CorrespondenceSettings()) == (32, 32)
    odd = score(Patches(), CorrespondenceSettings(data=spair, size=50), tmp_path / "o")
    assert "50 px was asked for; patches takes 48x48, which was used" in odd.notes


def test_pairs_are_spread_over_each_class_and_difference_of_view(spair: Path) -> None:
    data = open_spair(spair, pairs_per_class=2, memo=None)
    assert [[pair.category for pair in block] for block in data.blocks] == [["bus"] * 4, ["cat"] * 4]
    for block, first in zip(data.blocks, (7, 1), strict=True):
        kept = {int(pair.id.split("-")[0]) - first: set(pair.parts) for pair in block}
        # Of six: the first and the fourth; of three of each difference: the first and the second.
        odd, even = ("_view1", "_view0") if first % 2 else ("_view0", "_view1")
        assert kept == {0: {"", odd}, 1: {even}, 2: {odd}, 3: {"", even}}
    assert len(open_spair(spair, pairs_per_class=200, memo=None).blocks[0]) == 6


def test_pairs_without_an_image_are_left_out(tmp_path: Path, spair: Path) -> None:
    (spair / "JPEGImages" / "cat" / "2.jpg").write_bytes(b"no image")
    Image.new("RGB", (31, 18)).save(spair / "JPEGImages" / "bus" / "0.jpg")
    settings = CorrespondenceSettings(data=spair, size=64)
    report = score(Patches(), settings, tmp_path / "o")
    (info,) = report.data
    assert {skipped.key: skipped.reason for skipped in info.skipped}["bus/0.jpg"] == (
        "has 31x18 pixels, and its annotations say 32x18"
    )
    assert info.count == 4 and len(info.skipped) == 2
    left = {record["unit"] for record in lines(report, tmp_path / "o")}
    assert left == {"000001-0-1:cat", "000002-1-0:cat", "000011-1-2:bus", "000012-2-1:bus"}
    for path in spair.glob("JPEGImages/*/*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"SPair-71k: none of 12 pairs can be read; bus/"):
        score(Patches(), settings, tmp_path / "o")


def test_only_pairs_that_are_scored_count(tmp_path: Path, spair: Path) -> None:
    """Of each class all but one pair are of one view; where these cannot be read, the view has no score."""
    for number in (0, 6):
        change(spair, number, viewpoint_variation=2)
    whole = score(Patches(), CorrespondenceSettings(data=spair, size=64, pairs_per_class=1), tmp_path / "o")
    assert whole.settings["resolved"]["pairs"] == 2 and whole.data[0].num_classes == 2
    (spair / "JPEGImages" / "bus" / "0.jpg").write_bytes(b"no image")
    (spair / "JPEGImages" / "cat" / "0.jpg").write_bytes(b"no image")
    report = score(Patches(), CorrespondenceSettings(data=spair, size=64), tmp_path / "p")
    assert set(report.metrics) == {*("pck_0.1", "pck_0.05", "pck_0.2"), "pck_0.1_view0", "pck_0.1_view1"}
    assert report.settings["resolved"]["pairs"] == 4
    change(spair, 2, viewpoint_variation=2)  # so that the first pair of view 1 is of two other images
    with pytest.raises(DataError, match="only pairs that count in a difference of view alone can be read"):
        score(Patches(), CorrespondenceSettings(data=spair, size=64, pairs_per_class=1), tmp_path / "q")


def test_batches_blocks_and_the_cache_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = CorrespondenceSettings(scenes=7, size=48), Patches()
    whole = score(model, settings, tmp_path / "o")
    assert model.images == 14  # each once
    assert score(model, settings, tmp_path / "p").metrics == whole.metrics and model.images == 14
    monkeypatch.setattr(data_module, "_BLOCK", 2)
    parts = score(model, settings, tmp_path / "q", batch_size=3, cache=tmp_path / "other")
    assert parts.metrics == whole.metrics
    assert lines(parts, tmp_path / "q") == lines(whole, tmp_path / "o")
    for path in (tmp_path / "other" / "correspondence").glob("*/000001.*"):
        path.write_bytes(b"damaged")
    before = model.images
    again = score(model, settings, tmp_path / "r", cache=tmp_path / "other")
    assert again.metrics == whole.metrics and model.images == before + 4
    assert any("1 damaged file of the cache was made again" in note for note in again.notes)


def test_points_of_scenes_are_visible_in_both_views() -> None:
    data = make_scenes(12, seed=4)
    pairs = [pair for block in data.blocks for pair in block]
    assert len(pairs) == 12 and {len(pair.points) for pair in pairs} == {16}
    for index, pair in enumerate(pairs):
        views = [render_view(index, view, split="val", seed=4) for view in (0, 1)]
        moved = move_points(pair.points[:, 0], views[0].pose, views[1].pose)
        assert moved == pytest.approx(pair.points[:, 1], abs=1e-12)
        for side, view in enumerate(views):
            x, y = np.floor(pair.points[:, side] * 96).astype(int).T
            assert (view.scene.instances[y, x] == 1).all()
        main = views[1].scene.objects[0]
        left, top, right, bottom = main.box
        assert pair.reach == max(right - left, bottom - top) / 96
        assert pair.category == SHAPES[main.shape]
        turn = np.degrees(abs(views[1].pose.angle - views[0].pose.angle))
        assert pair.parts == ("", "_view0" if turn < 28 else "_view1" if turn < 56 else "_view2")
        assert data.images.read(pair.images[1]).numpy().tobytes() == views[1].scene.image.tobytes()


def test_coarse_maps_are_told(tmp_path: Path) -> None:
    report = score(Patches(), CorrespondenceSettings(scenes=4, upsample=1), tmp_path / "o")
    (note,) = (note for note in report.notes if "near enough" in note)
    assert note.startswith("only ") and note.endswith("see --upsample")
    fine = score(Patches(), CorrespondenceSettings(scenes=4, upsample=8), tmp_path / "o")
    assert not any("near enough" in note for note in fine.notes)


def test_reports_are_compared_by_point_and_resampled_by_pair(tmp_path: Path, spair: Path) -> None:
    class Others(Patches):
        fingerprint = "others"

        def __call__(self, images: torch.Tensor) -> Features:
            return super().__call__(images.flip(1) ** 3)

    folders = {"a": Patches(), "b": Others()}
    reports = {
        name: score(m, CorrespondenceSettings(data=spair, size=64), tmp_path / name)
        for name, m in folders.items()
    }

    def interval(copies: int, *, by_pair: bool) -> tuple[float | None, float | None]:
        """Compare the reports with every point's record written several times."""
        for name, report in reports.items():
            records = [json.loads(line) for line in originals[name]]
            many = [
                r | {"id": f"{r['id']}-{copy}"} | ({} if by_pair else {"unit": None})
                for r in records
                for copy in range(copies)
            ]
            (tmp_path / name / report.records).write_text("".join(json.dumps(r) + "\n" for r in many))
        found = compare(read_reports(tmp_path / "a"), read_reports(tmp_path / "b"), tolerance=0.5)
        (change,) = (change for change in found if change.metric == "pck_0.1")
        assert change.paired and change.difference == pytest.approx(
            values(reports["a"])["pck_0.1"] - values(reports["b"])["pck_0.1"]
        )
        return change.low, change.high

    originals = {
        name: (tmp_path / name / report.records).read_text().splitlines() for name, report in reports.items()
    }
    once = interval(1, by_pair=True)
    assert interval(9, by_pair=True) == pytest.approx(once)  # more points of the same pairs tell nothing new
    few, many = interval(1, by_pair=False), interval(9, by_pair=False)
    assert many[1] - many[0] < (few[1] - few[0]) / 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"src_kps": [[1, 2]]}, r"000001-0-1:cat\.json: has 1 points in src_kps and \d in trg_kps"),
        ({"src_kps": [], "trg_kps": []}, "has 0 points in src_kps and 0 in trg_kps"),
        ({"trg_bndbox": [5, 5, 5, 9]}, r"the box \[5.0, 5.0, 5.0, 9.0\] in trg_bndbox is empty"),
        ({"trg_bndbox": [5, 5]}, "trg_bndbox: list should have at least 4 items"),
        ({"trg_imsize": [0, 9, 3]}, "an image has no pixels by src_imsize or trg_imsize"),
        ({"trg_imsize": [9, 9, 3]}, r"two sizes of the image cat/1\.jpg, one in 00000\d"),
        ({"viewpoint_variation": 3}, "viewpoint_variation: input should be less than or equal to 2"),
        ({"src_imname": "gone.jpg"}, r"cat/gone\.jpg: no such image \(1 of 7 are absent\); unpack the whole"),
    ],
)
def test_annotations_that_cannot_be(tmp_path: Path, spair: Path, changes: dict[str, Any], said: str) -> None:
    change(spair, 0, **changes)
    with pytest.raises(DataError, match=said):
        score(Patches(), CorrespondenceSettings(data=spair), tmp_path / "o")


def test_what_is_absent_or_not_finite(tmp_path: Path, spair: Path) -> None:
    with pytest.raises(MissingDataError, match="has no PairAnnotation/test/"):
        score(Patches(), CorrespondenceSettings(data=tmp_path / "nowhere"), tmp_path / "o")
    with pytest.raises(DataError, match="--limit 0 leaves no pairs"):
        score(Patches(), CorrespondenceSettings(data=spair), tmp_path / "o", limit=0)

    class Broken(Patches):
        fingerprint = "broken"

        def __call__(self, images: torch.Tensor) -> Features:
            features = super().__call__(images)
            return features._replace(tokens=features.tokens / 0)

    with pytest.raises(RadioError, match="patches as float32 gives values that are not finite"):
        score(Broken(), CorrespondenceSettings(data=spair, size=64), tmp_path / "o")


def test_the_limit_is_of_pairs(tmp_path: Path, spair: Path) -> None:
    few = score(Patches(), CorrespondenceSettings(data=spair, size=64), tmp_path / "o", limit=1)
    assert len({record["unit"] for record in lines(few, tmp_path / "o")}) == 2  # one of each class
    few = score(Patches(), CorrespondenceSettings(), tmp_path / "o", limit=3)
    assert few.data[0].count == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scenes": 0}, "scenes"),
        ({"upsample": 9}, "upsample"),
        ({"size": 0}, "size"),
        ({"pairs_per_class": 0}, "pairs"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CorrespondenceSettings(**changes)


def _rank(rank: int, port: int, model: Backbone, settings: CorrespondenceSettings, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined():
        report = score(model, settings, out)
    (out / f"metrics-{rank}.json").write_text(json.dumps([m.value for m in report.metrics.values()]))


def test_two_ranks_write_the_report_of_one(tmp_path: Path, spair: Path, free_port: int) -> None:
    settings = CorrespondenceSettings(data=spair, size=64)
    alone = score(Patches(), settings, tmp_path / "one" / "out")
    out = tmp_path / "two" / "out"
    out.mkdir(parents=True)
    multiprocessing.spawn(_rank, (free_port, Patches(), settings, out), nprocs=2, join=True)
    assert read(out / "correspondence-patches.json").metrics == alone.metrics
    for rank in range(2):
        assert json.loads((out / f"metrics-{rank}.json").read_text()) == list(values(alone).values())
    name = "correspondence-patches.jsonl"
    assert (out / name).read_text() == (tmp_path / "one" / "out" / name).read_text()

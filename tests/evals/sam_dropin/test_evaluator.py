from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from pycocotools import mask as library
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segment_anything import SamPredictor

from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.sam_dropin import SamSettings
from evals.sam_dropin.data import open_instances
from evals.sam_dropin.prediction import Predictor
from radio.dist import joined
from radio.errors import ConfigError, DataError, RadioError
from radio.hub import load_backbone
from radio.teachers.scenes import scenes_sam

TIMED = ("encoder_rate", "decoder_rate")


def run(model: Any, settings: SamSettings, out: Path, **changes: Any) -> Report:
    """Evaluate with two images a batch, and with a cache folder beside the reports."""
    shared = RunSettings(**{"cache": out.parent / "cache", "batch_size": 2, **changes})
    return run_evaluator(make_evaluator("sam"), model, settings, out, run=shared)


@pytest.fixture
def settings(world: tuple[Path, Path]) -> SamSettings:
    return SamSettings(data=world[0], images=world[1], box_batch=2, save_masks=0)


def untimed(report: Report) -> Report:
    """What must be equal from run to run."""
    scores = {name: metric for name, metric in report.metrics.items() if name not in TIMED}
    return replace(report, metrics=scores, seconds={}, created="", peak_memory=None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def slow_ious(settings: SamSettings) -> dict[int, float]:
    """SAM's own predictor, one box at a time, and pycocotools' overlaps."""
    assert settings.data is not None and settings.images is not None
    predictor, found, theirs = SamPredictor(scenes_sam()), {}, COCO(str(settings.data))
    data = open_instances(settings.data, settings.images, limit=None, crowds=True, smallest_area=0, memo=None)
    for image in data.images:
        predictor.set_image(np.array(Image.open(settings.images / image.name).convert("RGB")))
        for instance in image.instances:
            masks, quality, _ = predictor.predict(box=np.array(instance.box))
            predictions = library.encode(np.asfortranarray(masks[quality.argmax()].astype(np.uint8)))
            truth = theirs.annToRLE(theirs.anns[instance.id])
            found[instance.id] = float(library.iou([predictions], [truth], [0])[0, 0])
    return found


def test_the_report_equals_the_predictor_box_by_box(settings: SamSettings, tmp_path: Path) -> None:
    report = run(load_backbone("scenes:sam"), settings, tmp_path / "out")
    expected = slow_ious(settings)
    records = lines(tmp_path / "out" / "sam-scenes-sam.jsonl")
    assert [record["id"] for record in records] == list(range(1, 10))
    for record in records:
        assert record["score"] == pytest.approx(expected[record["id"]], abs=2e-3)
    assert report.metrics["miou"].value == pytest.approx(100 * np.mean(list(expected.values())), abs=0.1)
    assert read(tmp_path / "out" / "sam-scenes-sam.json") == report
    assert report.primary_metric == "miou"
    assert {*TIMED, "filled_box_miou", "boundary_miou", "miou_small"} < set(report.metrics)
    assert "miou_large" not in report.metrics
    assert "9 annotations on 4 images, 1 of them crowds" in report.notes
    assert any("the prompt taken as the mask has an mIoU of" in note for note in report.notes)
    assert records[0]["image"] == "1.png"


def test_the_other_protocol_and_crowds(settings: SamSettings, tmp_path: Path) -> None:
    model = load_backbone("scenes:sam")
    both = run(model, settings, tmp_path / "a")
    vit = run(model, replace(settings, protocol="efficientvit-2025"), tmp_path / "b")
    plain = run(model, replace(settings, crowds=False), tmp_path / "c")
    assert [r.settings["resolved"]["annotations"] for r in (both, vit, plain)] == [9, 8, 8]
    zero = next(r for r in lines(tmp_path / "a" / "sam-scenes-sam.jsonl") if r["area"] == 0)
    assert zero["score"] == 0
    assert vit.metrics["miou"].value == pytest.approx(both.metrics["miou"].value * 9 / 8, abs=1e-3)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 16), (4, 1)])
def test_batches_do_not_change_it(settings: SamSettings, tmp_path: Path, sizes: tuple[int, int]) -> None:
    model = load_backbone("scenes:sam")
    one, other = (
        run(model, settings, tmp_path / "a"),
        run(model, replace(settings, box_batch=sizes[1]), tmp_path / "b", batch_size=sizes[0]),
    )
    for name, metric in untimed(one).metrics.items():
        assert other.metrics[name].value == pytest.approx(metric.value, abs=0.05)


def test_a_stopped_run_goes_on_and_ends_alike(
    settings: SamSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_backbone("scenes:sam")
    whole = run(model, settings, tmp_path / "whole", cache=tmp_path / "other")
    genuine, calls = Predictor.score, []

    def stopping(self: Any, loaded: Any) -> Any:
        calls.append(len(loaded))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return genuine(self, loaded)

    monkeypatch.setattr(Predictor, "score", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(model, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = run(model, settings, tmp_path / "out")
    assert calls == [2, 2, 2]  # the first chunk was not done again
    assert untimed(again) == untimed(replace(whole, settings=again.settings))
    names = [tmp_path / folder / "sam-scenes-sam.jsonl" for folder in ("out", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b"\x80\x04", None])
def test_damaged_records_are_made_again_and_noted(
    settings: SamSettings, tmp_path: Path, content: bytes | None
) -> None:
    model = load_backbone("scenes:sam")
    first = run(model, settings, tmp_path / "a")
    chunk = sorted((tmp_path / "cache" / "sam").rglob("*.jsonl"))[1]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole.replace(b"0.", b"1.", 1) if content is None else content)
    again = run(model, settings, tmp_path / "b")
    note = next(note for note in again.notes if "made again" in note)
    assert note.startswith("1 damaged file") and str(chunk) in note
    assert untimed(again).metrics == untimed(first).metrics
    assert run(model, settings, tmp_path / "c").notes == first.notes


def test_a_damaged_world_is_made_again_and_noted(tmp_path: Path) -> None:
    settings, model = SamSettings(scenes=3, save_masks=0), load_backbone("scenes:sam")
    first = run(model, settings, tmp_path / "a")
    (world,) = (path for path in (tmp_path / "cache" / "scenes").iterdir() if path.is_dir())
    for name, content in (("scenes.json", b"[" * 100_000), ("val/000000000001.jpg", b"\xff\xd8")):
        (world / name).write_bytes(content)
        again = run(model, settings, tmp_path / "b")
        assert any("1 damaged file of the cache was made again" in note for note in again.notes)
        assert untimed(again).metrics == untimed(first).metrics


def test_damaged_embeddings_are_made_again_and_noted(settings: SamSettings, tmp_path: Path) -> None:
    model, kept = load_backbone("scenes:sam"), replace(settings, keep_embeddings=True)
    run(model, kept, tmp_path / "a")
    file = sorted((tmp_path / "cache" / "sam-embeddings").iterdir())[0]
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    clicked = run(model, replace(kept, prompts="points"), tmp_path / "b")
    assert any("1 damaged file" in note and file.name in note for note in clicked.notes)
    fresh = run(model, replace(settings, prompts="points"), tmp_path / "c", cache=tmp_path / "other")
    assert clicked.metrics["miou"] == fresh.metrics["miou"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("boxes", ["detections", "truth"])
def test_a_model_that_is_not_finite_gets_no_score(
    settings: SamSettings, detections: SamSettings, tmp_path: Path, value: float, boxes: str
) -> None:
    model = load_backbone("scenes:sam")
    assert isinstance(model, torch.nn.Module)
    weights = next(p for name, p in model.named_parameters() if name.endswith("blocks.3.mlp.lin2.bias"))
    weights.data[0] = value
    chosen = settings if boxes == "truth" else detections
    with pytest.raises(RadioError, match=r"scenes:sam gives values that are not finite as float32; look"):
        run(model, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fill_disk(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Let the disk be full at the given file, counted from 1."""
    genuine, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_full_disk_leaves_what_stood(
    settings: SamSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Records and report belong together: neither is replaced where one of them does not fit."""
    model = load_backbone("scenes:sam")
    run(model, settings, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(model, replace(settings, crowds=False), tmp_path / "other")  # its cache is there now
    fill_disk(monkeypatch, fails)
    with pytest.raises(OSError, match=r"No space left on device: '.*out/sam-scenes-sam\.json"):
        run(model, replace(settings, crowds=False), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("fails", range(1, 6))  # three panels, records, report
def test_a_full_disk_leaves_no_panels(
    settings: SamSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    model = load_backbone("scenes:sam")
    run(model, settings, tmp_path / "out")  # its cache is there now
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fill_disk(monkeypatch, fails)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out/sam-scenes-sam[./]"):
        run(model, replace(settings, save_masks=1), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_bf16_rounds_a_copy(settings: SamSettings, tmp_path: Path) -> None:
    """Reports name the model that was given, and the next task computes with its weights."""
    model = load_backbone("scenes:sam")
    fingerprint = model.fingerprint
    before = run(model, settings, tmp_path / "a")
    rough = run(model, settings, tmp_path / "b", precision="bf16")
    assert rough.fingerprint == before.fingerprint == model.fingerprint == fingerprint
    assert rough.metrics["miou"] != before.metrics["miou"]
    after = run(model, settings, tmp_path / "c", cache=tmp_path / "other")
    assert untimed(after).metrics == untimed(before).metrics


def test_embeddings_can_be_kept_for_other_prompts(settings: SamSettings, tmp_path: Path) -> None:
    model = load_backbone("scenes:sam")
    kept = replace(settings, keep_embeddings=True)
    run(model, kept, tmp_path / "a")
    clicked = run(model, replace(kept, prompts="points"), tmp_path / "b")
    assert "encoder_rate" not in clicked.metrics and "decoder_rate" in clicked.metrics
    fresh = run(model, replace(settings, prompts="points"), tmp_path / "c", cache=tmp_path / "other")
    assert clicked.metrics["miou"] == fresh.metrics["miou"]


def test_more_clicks_help(tmp_path: Path) -> None:
    settings = SamSettings(scenes=12, prompts="points", save_masks=0)
    model = load_backbone("scenes:sam")
    one = run(model, settings, tmp_path / "out")
    three = run(model, replace(settings, clicks=3), tmp_path / "out")
    assert one.model == "scenes:sam-1-clicks" and three.model == "scenes:sam-3-clicks"
    assert three.metrics["miou"].value > one.metrics["miou"].value > 30


def test_panels_of_best_median_and_worst(settings: SamSettings, tmp_path: Path) -> None:
    report = run(load_backbone("scenes:sam"), replace(settings, save_masks=1), tmp_path / "out")
    panels = report.files[1:]
    assert [Path(panel).name.split("-")[1] for panel in panels] == ["best", "median", "worst"]
    records = {r["id"]: r["score"] for r in lines(tmp_path / "out" / report.files[0])}
    numbers = [int(Path(panel).stem.split("-")[-1]) for panel in panels]
    assert records[numbers[0]] == max(records.values()) and records[numbers[2]] == min(records.values())
    for panel in panels:
        with Image.open(tmp_path / "out" / panel) as image:
            assert image.width > 900 and image.height > 150


@pytest.fixture
def detections(settings: SamSettings, tmp_path: Path) -> SamSettings:
    """The ground truth's boxes as a detector's, with scores; one on the image without annotations."""
    assert settings.data is not None
    data = json.loads(settings.data.read_text())
    found = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9 - 0.05 * place}
        for place, annotation in enumerate(data["annotations"])
        if not annotation["iscrowd"]
    ]
    found.append({"image_id": 5, "category_id": 1, "bbox": [3, 3, 20, 20], "score": 0.99})
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    return replace(settings, detections=path, save_masks=None)


def test_the_scenes_have_a_detector_that_is_scored_by_lvis_rule(tmp_path: Path) -> None:
    settings = SamSettings(scenes=12, detections=Path("scenes"), score_thresholds=(0.1, 0.5))
    report = run(load_backbone("scenes:sam"), settings, tmp_path / "out")
    assert report.model == "scenes:sam-detections" and report.data[0].name == "scenes:val"
    assert 0 < report.metrics["ap_from_0.5"].value <= report.metrics["ap"].value
    assert "ap_frequent" in report.metrics
    assert any("cannot count by LVIS's rule" in note for note in report.notes)
    (root,) = (tmp_path / "cache" / "scenes").glob("lvis-*-12-seed0")
    files = {"data": root / "annotations" / "lvis_val.json", "images": root / "val"}
    named = replace(settings, **files, detections=root / "annotations" / "detections_val.json")
    theirs = run(load_backbone("scenes:sam"), named, tmp_path / "named")
    assert untimed(theirs).metrics == untimed(report).metrics


def test_a_detectors_boxes_are_scored_as_average_precision(detections: SamSettings, tmp_path: Path) -> None:
    """pycocotools on the predictor's masks, one box at a time."""
    report = run(load_backbone("scenes:sam"), detections, tmp_path / "out")
    assert detections.detections is not None and detections.images is not None
    truth, predictor, results = COCO(str(detections.data)), SamPredictor(scenes_sam()), []
    for entry in json.loads(detections.detections.read_text()):
        image = Image.open(detections.images / f"{entry['image_id']}.png")
        predictor.set_image(np.array(image.convert("RGB")))
        x, y, w, h = entry["bbox"]
        masks, quality, _ = predictor.predict(box=np.array([x, y, x + w, y + h]))
        mask = library.encode(np.asfortranarray(masks[quality.argmax()].astype(np.uint8)))
        results.append({**entry, "segmentation": {**mask, "counts": mask["counts"].decode()}})
    for result in results:
        del result["bbox"]
    scorer = COCOeval(truth, truth.loadRes(results), "segm")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert report.model == "scenes:sam-detections"
    for name, value in zip(("ap", "ap50", "ap75", "ap_small"), scorer.stats[:4], strict=True):
        assert report.metrics[name].value == pytest.approx(100 * value, abs=0.5), name
    assert "ap_large" not in report.metrics  # no ground truth of that size
    assert report.notes[0] == "9 detections on 5 of 5 images"
    assert len(lines(tmp_path / "out" / "sam-scenes-sam-detections.jsonl")) == 9


@pytest.mark.parametrize("first", [0, -4, 2**53])
def test_the_ids_of_annotations_do_not_change_average_precision(
    detections: SamSettings, tmp_path: Path, first: int
) -> None:
    """COCOeval takes a match with id 0 for none, and lacks a default for crowds."""
    assert detections.data is not None
    model = load_backbone("scenes:sam")
    expected = run(model, detections, tmp_path / "a")
    data = json.loads(detections.data.read_text())
    for place, annotation in enumerate(data["annotations"]):
        annotation["id"] = first + place
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    detections.data.write_text(json.dumps(data))
    assert untimed(run(model, detections, tmp_path / "b")).metrics == untimed(expected).metrics


def test_thin_and_turned_images_are_scored(tmp_path: Path) -> None:
    sizes, exif = ((1, 300), (300, 1), (1, 1), (32, 32)), Image.Exif()
    exif[0x0112] = 6
    images, annotations = [], []
    for number, (height, width) in enumerate(sizes, start=1):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (width, height), (200, 30, 30)).save(file, **({"exif": exif} if number == 4 else {}))
        images.append({"id": number, "file_name": file.name, "height": height, "width": width})
        counts = {"size": [height, width], "counts": [0, height * width]}
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "area": height * width}
            | {"bbox": [0, 0, width, height], "segmentation": counts}
        )
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "all 多"}]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    settings = SamSettings(data=tmp_path / "data.json", images=tmp_path, save_masks=1)
    report = run(load_backbone("scenes:sam"), settings, tmp_path / "out")
    assert len(lines(tmp_path / "out" / report.files[0])) == 4
    assert report.metrics["filled_box_miou"].value == 100
    assert any(note.startswith("1 of 4 images has an EXIF orientation that is not") for note in report.notes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
            r"not COCO results, a list of objects with .*: \[0\]\.score: field required",
        ),
        ({"annotations": []}, "not COCO results"),
        ([], "holds no detections"),
        ([{"image_id": 77, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}], "entry 0 is of image 77"),
        (
            [{"image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 1}],
            "category 9, and .* not have",
        ),
    ],
)
def test_bad_detections(detections: SamSettings, tmp_path: Path, entries: Any, message: str) -> None:
    assert detections.detections is not None
    detections.detections.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message):
        run(load_backbone("scenes:sam"), detections, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("a.json")}, "--data JSON and --images FOLDER belong together"),
        ({"box_batch": 0}, "box_batch: 0 is out of bounds; give a number of at least 1"),
        ({"size": 10**9}, "size: 1000000000 is out of bounds"),
        ({"clicks": 10**9, "prompts": "points"}, "clicks: 1000000000 is out of bounds"),
        ({"scenes": 10**15}, "scenes: 1000000000000000 is out of bounds"),
        ({"clicks": 3}, "clicks = 3 goes with --prompts points"),
        ({"save_masks": -1}, "save_masks: -1 is out of bounds"),
        (
            {"score_thresholds": (1.0, 1.0)}
            | dict.fromkeys(("data", "images", "detections"), Path("d.json")),
            "give each score once",
        ),
        (
            {"score_thresholds": (0.3, 0.3000001)}
            | dict.fromkeys(("data", "images", "detections"), Path("d.json")),
            "two of them are 0.3 to six digits, which name them in the report",
        ),
        ({"score_thresholds": (0.5,)}, "--score-thresholds are of a detector's boxes"),
        ({"detections": Path("d.json")}, r"--detections d\.json needs --data, .*give --detections scenes"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamSettings(**changes)


def test_an_unreadable_image_stops_the_run(settings: SamSettings, tmp_path: Path) -> None:
    assert settings.images is not None
    (settings.images / "3.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"3\.png: not an image"):
        run(load_backbone("scenes:sam"), settings, tmp_path / "out")


def _rank(rank: int, port: int, tmp_path: Path, settings: SamSettings) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with joined():
        run(load_backbone("scenes:sam"), settings, tmp_path / "two", batch_size=1)


def test_two_ranks_give_the_same_report(
    settings: SamSettings, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiprocessing.spawn(_rank, args=(free_port, tmp_path, settings), nprocs=2)
    two = read(tmp_path / "two" / "sam-scenes-sam.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = run(load_backbone("scenes:sam"), settings, tmp_path / "one", batch_size=1, cache=tmp_path / "other")
    torch.set_num_threads(threads)
    assert two.settings["resolved"]["ranks"] == 2
    assert untimed(two).metrics == untimed(one).metrics
    names = [tmp_path / folder / "sam-scenes-sam.jsonl" for folder in ("one", "two")]
    assert names[0].read_bytes() == names[1].read_bytes()

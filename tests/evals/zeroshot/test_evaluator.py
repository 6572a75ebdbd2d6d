from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from evals.core.blocks import Confusions
from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.zeroshot import ZeroshotSettings
from radio.data import open_source
from radio.dist import joined
from radio.errors import ConfigError, DataError, RadioError
from radio.hub import load_backbone
from radio.images import evaluation_view


def run(model: Any, settings: ZeroshotSettings, out: Path, **changes: Any) -> Report:
    """Evaluate with a cache folder beside the reports, seven images at a time."""
    shared = RunSettings(**{"cache": out.parent / "cache", "batch_size": 7, **changes})
    return run_evaluator(make_evaluator("zeroshot"), model, settings, out, run=shared)


SAID = ("a {}", "there is {}")


@pytest.fixture
def model(backbone: Callable[..., Any], words: Any) -> Any:
    """A backbone that has words."""
    made = backbone()
    made.text = words
    return made


@pytest.fixture
def settings(tmp_path: Path, make_folder: Callable[..., Path]) -> ZeroshotSettings:
    """Six classes of five images, two templates."""
    (tmp_path / "templates.txt").write_text("\n".join(SAID))
    query = make_folder(tmp_path / "d" / "val", classes=6, count=5)
    return ZeroshotSettings(query=str(query), templates=str(tmp_path / "templates.txt"))


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a records file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def slow_cosines(model: Any, settings: ZeroshotSettings) -> tuple[torch.Tensor, list[int]]:
    """The protocol image by image and prompt by prompt: cosines [N, K], and labels."""
    source = open_source(str(settings.query))
    columns = []
    for name in source.classes:
        vectors = [F.normalize(model.text.encode([said.replace("{}", name)]), dim=1) for said in SAID]
        columns.append(F.normalize(torch.cat(vectors).mean(0, keepdim=True), dim=1))
    rows = []
    for place in range(len(source.keys)):
        view = evaluation_view(source.read(place), model.native_size)[None]
        rows.append(F.normalize(model.text.project(model(view).summary), dim=1))
    return torch.cat(rows) @ torch.cat(columns).T, source.labels.tolist()


def test_the_report_equals_the_protocol_as_a_loop(
    tmp_path: Path, settings: ZeroshotSettings, model: Any
) -> None:
    report = run(model, settings, tmp_path / "out")
    cosines, labels = slow_cosines(model, settings)
    order = cosines.argsort(dim=1, descending=True)
    right = sum(int(row[0]) == label for row, label in zip(order, labels, strict=True))
    five = sum(label in row[:5].tolist() for row, label in zip(order, labels, strict=True))
    assert 0 < right < 30
    assert report.metrics["top1"].value == pytest.approx(100 * right / 30)
    assert report.metrics["top5"].value == pytest.approx(100 * five / 30)
    assert read(tmp_path / "out" / "zeroshot-pooled.json") == report
    assert report.settings["resolved"]["chance"] == pytest.approx(100 / 6)
    lines = records(tmp_path / "out" / "zeroshot-pooled.jsonl")
    assert [line["predictions"] for line in lines] == [[f"c{int(k)}" for k in row[:5]] for row in order]
    assert [line["label"] for line in lines] == [f"c{label}" for label in labels]
    assert lines[0]["logits"][0] == pytest.approx(100 * float(cosines[0].max()), abs=1e-3)
    assert sum(line["score"] for line in lines) == right
    assert sum(
        count for block in report.blocks if isinstance(block, Confusions) for _, _, count in block.rows
    ) == (30 - right)


def test_batches_do_not_change_it(tmp_path: Path, settings: ZeroshotSettings, model: Any) -> None:
    one = run(model, settings, tmp_path / "a", batch_size=1, cache=tmp_path / "one")
    many = run(model, settings, tmp_path / "b", batch_size=30, cache=tmp_path / "many")
    assert one.metrics == many.metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["images", "texts"])
def test_a_side_of_nan_gets_no_score(
    tmp_path: Path, settings: ZeroshotSettings, model: Any, side: str, value: float
) -> None:
    if side == "images":
        model.text.project = lambda summaries: summaries * value
    else:
        model.text.encode = lambda texts: torch.full((len(texts), 24), value)
    with pytest.raises(RadioError, match="values that are not finite"):
        run(model, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_vectors_of_any_length_are_scored_alike(
    tmp_path: Path, settings: ZeroshotSettings, model: Any, scale: float
) -> None:
    first = run(model, settings, tmp_path / "a")
    project, encode = model.text.project, model.text.encode
    model.text.project = lambda summaries: project(summaries) * scale
    model.text.encode = lambda texts: encode(texts) * scale
    again = run(model, settings, tmp_path / "b", cache=tmp_path / "other")
    assert again.metrics == first.metrics


@pytest.mark.parametrize("what", ["features", "texts"])
def test_a_damaged_cache_changes_no_score_and_is_told(
    tmp_path: Path, settings: ZeroshotSettings, model: Any, what: str
) -> None:
    first = run(model, settings, tmp_path / "a")
    (path,) = (tmp_path / "cache" / what).rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[::-1])
    again = run(model, settings, tmp_path / "b")
    assert again.metrics == first.metrics
    assert any(f"made again; the first: {path}" in note for note in again.notes)


def test_below_five_classes_there_is_no_top5(
    tmp_path: Path, settings: ZeroshotSettings, model: Any, make_folder: Callable[..., Path]
) -> None:
    three = make_folder(tmp_path / "three", classes=3, count=2)
    report = run(model, replace(settings, query=str(three)), tmp_path / "out")
    assert list(report.metrics) == ["top1", "mean_class"]


@pytest.fixture
def captions(tmp_path: Path, png: Callable[[int, int], bytes]) -> ZeroshotSettings:
    """Eight images, one without captions, two captions each."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = [{"id": 10 * n, "file_name": f"{n}.png"} for n in range(8)]
    said = []
    for n in range(8):
        (folder / f"{n}.png").write_bytes(png(n % 3, n))
        if n != 5:
            said += [{"id": 2 * n + k, "image_id": 10 * n, "caption": f"{k} words {n}"} for k in range(2)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": said[::-1]}))
    return ZeroshotSettings(captions=str(path), images=folder)


def test_retrieval_equals_sorting_everything(tmp_path: Path, captions: ZeroshotSettings, model: Any) -> None:
    report = run(model, captions, tmp_path / "out")
    kept = [n for n in range(8) if n != 5]
    views = [evaluation_view(open_image(captions, n), model.native_size)[None] for n in kept]
    images = F.normalize(torch.cat([model(view).summary for view in views]), dim=1)
    texts = [(n, f"{k} words {n}") for n in kept for k in (1, 0)]
    vectors = F.normalize(torch.cat([model.text.encode([text]) for _, text in texts]), dim=1)
    cosines = images @ vectors.T
    for k in (1, 5):
        hits = sum(
            any(texts[place][0] == n for place in cosines[row].argsort(descending=True)[:k].tolist())
            for row, n in enumerate(kept)
        )
        assert report.metrics[f"image_to_text_r{k}"].value == pytest.approx(100 * hits / 7)
        hits = sum(
            kept.index(n) in cosines[:, column].argsort(descending=True)[:k].tolist()
            for column, (n, _) in enumerate(texts)
        )
        assert report.metrics[f"text_to_image_r{k}"].value == pytest.approx(100 * hits / 14)
    assert report.metrics["text_to_image_r10"].value == 100
    assert report.model == "pooled-retrieval" and report.settings["resolved"]["captions"] == 14
    lines = records(tmp_path / "out" / "zeroshot-pooled-retrieval.jsonl")
    assert [line["id"] for line in lines[:7]] == [f"{n}.png" for n in kept]
    assert {line["image"] for line in lines[7:]} == {f"{n}.png" for n in kept}


def open_image(captions: ZeroshotSettings, number: int) -> torch.Tensor:
    from radio.images import decode

    assert captions.images is not None
    return decode((captions.images / f"{number}.png").read_bytes())


def test_captions_of_unreadable_images_are_left_out(
    tmp_path: Path, captions: ZeroshotSettings, model: Any
) -> None:
    assert captions.images is not None
    (captions.images / "2.png").write_bytes(b"no image")
    report = run(model, captions, tmp_path / "out")
    assert [skipped.key for skipped in report.data[0].skipped] == ["2.png"]
    assert report.data[0].count == 6 and report.settings["resolved"]["captions"] == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("annotations"), "not COCO captions .*annotations: field required"),
        (
            lambda d: d["annotations"][0].pop("caption"),
            r"not COCO captions .*annotations\[0\].caption: field",
        ),
        (lambda d: d["annotations"][0].update(image_id=999), "annotation 0 is of the image 999, which the"),
        (lambda d: d["annotations"][0].update(image_id=[1]), r"annotations\[0\].image_id"),
        (
            lambda d: d["annotations"][0].update(caption=5),
            r"annotations\[0\].caption: input should be .* text|string",
        ),
        (lambda d: d["annotations"][1].update(caption=" "), "annotation 1 has an empty caption"),
        (lambda d: d["images"][1].update(id=d["images"][0]["id"]), "image 1 has the id .* of another"),
        (
            lambda d: d["images"][1].update(file_name=d["images"][0]["file_name"]),
            "image 1 has the file .* of an",
        ),
        (lambda d: d["images"][1].update(id=True), r"images\[1\].id"),
        (lambda d: d["images"][0].update(file_name="a\x00b"), r"first is a\\x00b"),
        (lambda d: d["images"][0].update(file_name="x" * 5000), "1 of the 7 images"),
        (lambda d: d.update(annotations=[]), "no image in it has a caption"),
        (lambda d: d["images"][0].update(file_name="gone.png"), "1 of the 7 images .* first is gone.png"),
    ],
)
def test_bad_captions(
    tmp_path: Path, captions: ZeroshotSettings, model: Any, change: Callable[[Any], Any], said: str
) -> None:
    path = Path(str(captions.captions))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=said):
        run(model, captions, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"captions": "c.json"}, "--captions FILE and --images FOLDER belong together"),
        ({"images": Path("d")}, "--captions FILE and --images FOLDER belong together"),
        ({"captions": "scenes", "query": "d"}, "retrieval reads captions, not d"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ZeroshotSettings(**changes)


def test_the_shipped_clip_reads_and_finds_the_scenes(tmp_path: Path) -> None:
    clip = load_backbone("scenes:clip")
    settings, out = ZeroshotSettings(scenes=120), tmp_path / "out"
    assert run(clip, settings, out).metrics["top1"].value > 75
    found = run(clip, replace(settings, captions="scenes"), out)
    assert found.metrics["image_to_text_r10"].value > 80
    with pytest.raises(DataError, match="leaves no images"):
        run(clip, replace(settings, captions="scenes"), out, limit=0)


def _rank(rank: int, port: int, tmp_path: Path, settings: ZeroshotSettings) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with joined():
        run(load_backbone("scenes:clip"), settings, tmp_path / "two")


def test_two_ranks_give_the_same_report(tmp_path: Path, free_port: int) -> None:
    settings = ZeroshotSettings(scenes=700)
    multiprocessing.spawn(_rank, args=(free_port, tmp_path, settings), nprocs=2)
    two = read(tmp_path / "two" / "zeroshot-scenes-clip.json")
    one = run(load_backbone("scenes:clip"), settings, tmp_path / "one", cache=tmp_path / "other")
    assert (two.metrics, two.blocks, two.data) == (one.metrics, one.blocks, one.data)
    assert two.settings["resolved"]["ranks"] == 2


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "", "1" * 5000, "\xff", '{"images": NaN}'])
def test_files_that_are_no_captions(
    tmp_path: Path, captions: ZeroshotSettings, model: Any, content: str
) -> None:
    Path(str(captions.captions)).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"captions\.json: "):
        run(model, captions, tmp_path / "out")


def test_captions_with_a_mark_and_other_accents(
    tmp_path: Path, captions: ZeroshotSettings, model: Any
) -> None:
    first = run(model, captions, tmp_path / "a")
    path = Path(str(captions.captions))
    data = json.loads(path.read_text())
    (captions.images / data["images"][0]["file_name"]).rename(captions.images / "cafe\u0301.png")
    data["images"][0]["file_name"] = "caf\u00e9.png"
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    again = run(model, captions, tmp_path / "b")
    assert again.metrics == first.metrics


def test_numbered_folders_get_the_names_by_their_numbers(
    tmp_path: Path, settings: ZeroshotSettings, model: Any, make_folder: Callable[..., Path]
) -> None:
    root = make_folder(tmp_path / "numbered", classes=12, count=1)
    names = [
        f"thing {word}"
        for word in ["zebra", "ant", "bee", "cow", "dog", "eel", "fox", "goat", "hen", "ibis", "jay", "koala"]
    ]
    (tmp_path / "names.txt").write_text("\r\n".join(names), encoding="utf-8-sig")
    asked = replace(settings, query=str(root), class_names=str(tmp_path / "names.txt"))
    report = run(model, asked, tmp_path / "out")
    found = {
        line["id"].split("/")[0]: line["label"]
        for line in records(tmp_path / "out" / "zeroshot-pooled.jsonl")
    }
    assert found == {f"c{number}": name for number, name in enumerate(names)}
    assert any("in the order of their numbers: c0, c1, c2, c3, …" in note for note in report.notes)

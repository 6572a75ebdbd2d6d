"""The page: what is in it, what is escaped, and what happens when something is missing."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from evals.core.report import DataUsed, Metric, Table, proportion
from evals.reporting.html import write_page
from evals.reporting.images import ImageBudget
from evals.reporting.overview import gather, kind_of, overview, sorted_tasks
from radio import entry
from radio.errors import ConfigError, DataError, MissingExtraError

from .conftest import Folder, metric

NASTY = "<script>alert(\"x\")</script> & '😀'"


class Reader(HTMLParser):
    """The text of a page, its tables, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._path: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "link", "img"):
            return
        self._path.append(tag)
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows
        if tag in self._path:
            while self._path.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self._path or "script" in self._path:
            return
        self.text += data
        if "caption" in self._path:
            self._caption += data
        elif "small" not in self._path and ("td" in self._path or "th" in self._path):
            self._rows[-1][-1] += data.strip()

    def table(self, start: str) -> list[list[str]]:
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return found


def read_page(folder: Folder, **options: object) -> Reader:
    path = folder.path.parent / "page.html"
    size = write_page(folder.path, path, images=False, **options)  # type: ignore[arg-type]
    assert size == path.stat().st_size
    return Reader(path.read_text(encoding="utf-8"))


def knn(folder: Folder, model: str, right: int, *lines: object, **changes: object) -> None:
    name = folder.records(f"knn-{re.sub('[^a-z]', '', model)}.jsonl", *lines)
    folder.add("knn", model, metrics={"top1": proportion(right, 40)}, files=(name,), **changes)


def test_the_overview_has_a_row_a_model_a_column_a_task_and_the_paper_apart(folder: Folder) -> None:
    folder.add("knn", "scenes:clip", metrics={"top1": metric(90.0)})
    folder.add("knn", "demo", metrics={"top1": metric(85.0)}, fingerprint="same")
    folder.add("knn", "demo-untrained", metrics={"top1": metric(10.0)})
    folder.add(
        "sam", "student", primary_metric="miou",
        metrics={"miou": metric(80.0), "filled_box_miou": metric(53.7)}, fingerprint="same",
    )  # fmt: skip
    page = read_page(folder)
    head, *rows = page.table("Every model on every task")
    assert head == ["model", "kind", "k-NN: top1 (%)", "SAM drop-in: miou (%)"]
    assert rows == [
        ["student", "student", "85.0 ±2.0", "80.0 ±2.0"],
        ["scenes:clip", "teacher", "90.0 ±2.0", ""],
        ["demo-untrained", "untrained", "10.0 ±2.0", ""],
        ["baseline", "baseline", "25.0", "53.7"],
        ["RADIO ViT-H/14", "paper", "85.29", ""],
        ["RADIO ViTDet-H/14, window 18", "paper", "", "75.42"],
    ]
    assert "also demo" in page.text and "AM-RADIO, CVPR 2024, table 7" in page.text
    assert "ImageNet-1k, k = 20, top-1" in page.text


def test_names_are_one_model_only_with_the_same_weights_and_no_task_in_common(folder: Folder) -> None:
    reports = [
        folder.add("knn", "demo", fingerprint="w"),
        folder.add("knn", "demo-clip-head", fingerprint="w"),
        folder.add("seg", "other", fingerprint="w"),
        folder.add("seg", "third", fingerprint="v"),
        folder.add("vqa", "predictions", fingerprint=""),
        folder.add("vqa", "others", fingerprint=""),
    ]
    found = {model.name: model.also for model in gather(reports)}
    assert found == {
        "other": ("demo",), "demo-clip-head": (), "third": (), "predictions": (), "others": ()
    }  # fmt: skip


def test_scores_on_other_data_stand_in_a_column_of_their_own(folder: Folder) -> None:
    other = (DataUsed(role="query", name="cifar", fingerprint="b" * 64, count=10, num_classes=10),)
    reports = [folder.add("knn", "demo"), folder.add("knn", "pip:efficientnet-lite0", data=other)]
    grid = overview(gather(reports), sorted_tasks(reports))
    assert [(column.name, column.small) for column in grid.columns[2:]] == [
        ("k-NN: top1 (%)", "d, 40"),
        ("k-NN: top1 (%)", "cifar, 10"),
    ]
    assert [[cell.text for cell in row[2:]] for row in grid.rows] == [["75.0 ±13.0", ""], ["", "75.0 ±13.0"]]
    assert kind_of("pip:efficientnet-lite0") == "teacher" and kind_of("x:y") == "student"
    page = read_page(folder)
    assert "not made on the same data" in page.text


def test_settings_that_differ_are_told(folder: Folder) -> None:
    folder.add("knn", "a", settings={"seed": 0, "limit": None, "batch": 4}, machine_settings=("batch",))
    folder.add("knn", "b", settings={"seed": 0, "limit": 200, "batch": 8}, machine_settings=("batch",))
    page = read_page(folder)
    assert "not made alike: limit is null or 200" in page.text
    assert page.text.count("not made alike") == 1
    assert "batch is" not in page.text


def test_knn_shows_the_curve_over_k_and_the_confusions_of_all(folder: Folder) -> None:
    def line(label: str, taken: str) -> dict[str, object]:
        return {"key": f"{label}{taken}", "label": label, "predictions": [taken]}

    settings = {
        "k": [10, 20],
        "primary_k": None,
        "bank": "nowhere",
        "query": "gone",
        "scenes": [6, 4],
        "seed": 0,
    }
    metrics = {"top1": metric(50.0), "top1_k10": metric(40.0), "top1_k100": metric(30.0)}
    for model, second in (("a", "y"), ("b", "x")):
        lines = [line("x", "y"), line("x", "y"), line("y", second), line("z", "x")]
        name = folder.records(f"knn-{model}.jsonl", *lines)
        folder.add("knn", model, metrics=metrics, settings=settings, files=(name,))
    page = read_page(folder)
    assert page.table("The commonest confusions of a") == [
        ["class", "taken for", "a", "b"],
        ["x", "y", "2", "2"],
        ["z", "x", "1", "1"],
    ]
    assert "top-1 (%) over k" in page.text
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert "images are not shown: gone: no such folder" in page.text


def test_wrong_neighbours_are_drawn_again_from_the_world(folder: Folder) -> None:
    from radio.data import open_source

    bank, asked = (open_source(f"scenes:{split}", scenes=6, seed=3) for split in ("train", "val"))
    label = asked.classes[int(asked.labels[2])]
    taken = bank.classes[int(bank.labels[1])]
    record = {
        "key": "val/000002", "label": label, "predictions": [taken],
        "neighbours": ["train/000001", "train/000009"], "similarities": [0.91, 0.5],
    }  # fmt: skip
    data = tuple(
        DataUsed(role=role, name="s", fingerprint=source.fingerprint, count=6, num_classes=60)
        for role, source in (("bank", bank), ("query", asked))
    )
    name = folder.records("knn-a.jsonl", record)
    settings = {"k": [20], "bank": None, "query": None, "scenes": [6, 6], "seed": 3}
    folder.add("knn", "a", settings=settings, data=data, files=(name,))
    page = read_page(folder)
    shown = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert shown == [f"val/000002: {label}", f"train/000001: {taken}"]
    assert "train/000009, are not in scenes:train any more" in page.text
    folder.add("knn", "a", settings={**settings, "seed": 4}, data=data, files=(name,))
    page = read_page(folder)
    assert "not drawn as it was when this was scored" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_masks_and_overlays_are_embedded_and_what_is_missing_is_told(folder: Folder) -> None:
    files = (
        folder.records("sam-a.jsonl", {"annotation_id": 7, "iou": 0.5}),
        folder.image("sam-a/00-best-3-7.png"),
        "sam-a/gone.png",
        "../outside.png",
    )
    folder.image("../outside.png")
    (folder.path / "sam-a" / "text.png").write_text("no image")
    metrics = {
        "miou": metric(50.0),
        "miou_small": metric(40.0),
        "encoder_rate": Metric(value=9.0, unit="images/s"),
    }
    folder.add("sam", "a", primary_metric="miou", metrics=metrics, files=(*files, "sam-a/text.png"))
    table = Table(
        columns=("class", "iou", "acc"), rows=(("tree", 80.0, 1.0), ("road", 20.0, 2.0), ("sky", None, None))
    )
    folder.add(
        "seg", "a", primary_metric="miou", metrics={"miou": metric(50.0)}, tables={"classes": table},
        files=(folder.image("m/x-overlay.png"), folder.image("m/x.png")),
    )  # fmt: skip
    page = read_page(folder)
    shown = [
        (attributes["alt"], (attributes["src"] or "")[:16]) for tag, attributes in page.tags if tag == "img"
    ]
    assert shown == [("a, x", "data:image/webp;"), ("a, best: IoU 50.0, image 3", "data:image/webp;")]
    for said in ("gone.png is not there", "outside.png is not inside the folder", "text.png: not an image"):
        assert said in page.text
    assert page.table("IoU of each class")[1:] == [["road", "20"], ["tree", "80"]]


def test_answers_right_and_wrong(folder: Folder) -> None:
    lines = [
        {"image": "p.jpg", "question": "Which?", "answer": "red", "expected": ["red", "pink"], "score": 1.0},
        {"image": "q.jpg", "question": "How many?", "answer": "", "expected": "2", "score": 0.0},
    ]
    folder.image("images/p.jpg")
    folder.add(
        "vqa", "a", primary_metric="accuracy", metrics={"accuracy": metric(50.0), "gqa": metric(50.0)},
        settings={"images": str(folder.path / "images")},
        files=(folder.records("vqa-a-gqa.jsonl", *lines),),
    )  # fmt: skip
    page = read_page(folder)
    for said in ("a, gqa: answers", "Which?", "expected: red / pink, worth 1", "answered: (nothing)"):
        assert said in page.text
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == ["p.jpg"]


@pytest.mark.parametrize("task", ["knn", "zeroshot", "seg", "sam", "vqa", "mine"])
def test_records_that_are_gone_or_foreign_are_told_of(folder: Folder, task: str) -> None:
    (folder.path / "odd.jsonl").write_text('{"key": 1}\nnot json\n[]\n')
    folder.add(task, "a", files=(f"{task}-a.jsonl", "odd.jsonl"))
    page = read_page(folder)
    if task in ("knn", "zeroshot", "vqa"):
        assert f"{task}-a.jsonl is not there" in page.text
        assert "3 of the 3 lines of odd.jsonl cannot be read" in page.text
    assert page.table("All metrics")[1] == ["a", "75.0 ±13.0"]


def test_what_comes_from_data_is_text(folder: Folder) -> None:
    folder.add(
        "seg", NASTY, primary_metric="miou", metrics={"miou": metric(1.0)},
        tables={"classes": Table(columns=("class", "iou"), rows=((NASTY, 1.0),)), NASTY: classes_of(NASTY)},
        notes=(NASTY,), settings={NASTY: NASTY}, device=NASTY, files=(f"{NASTY}-overlay.png",),
        data=(DataUsed(role=NASTY, name=NASTY, fingerprint="a", count=1, num_classes=2),),
    )  # fmt: skip
    page = read_page(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1  # our own
    assert page.text.count(NASTY) > 10


def classes_of(name: str) -> Table:
    return Table(columns=(name, "n"), rows=((name, 1),))


def test_the_page_asks_for_nothing_and_allows_only_its_own_script(folder: Folder) -> None:
    folder.add("knn", "a")
    page = read_page(folder)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'") and "'sha256-" in policy


def test_the_same_reports_give_the_same_page(folder: Folder) -> None:
    folder.add("knn", "a", metrics={"top1": metric(50.0), "top1_k10": metric(40.0)}, settings={"k": [10, 20]})
    first, second = folder.path.parent / "1.html", folder.path.parent / "2.html"
    write_page(folder.path, first, images=False)
    write_page(folder.path, second, images=False)
    assert first.read_bytes() == second.read_bytes()


def test_images_stop_where_the_page_is_full() -> None:
    image_budget = ImageBudget(most_bytes=3000)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    found = [image_budget.add(noise, "noise", side=32) for _ in range(20)]
    kept = [image for image in found if image is not None]
    assert 0 < len(kept) < 20 and image_budget.left_out == 20 - len(kept)
    assert sum(len(image.src) for image in kept) <= 3000
    big = ImageBudget().add(np.zeros((100, 400, 3), np.uint8), "wide", side=200, exact=True)
    assert big is not None and (big.width, big.height) == (200, 50) and big.src.startswith("data:image/png;")


def test_curves_come_with_a_run_and_maps_with_models(folder: Folder) -> None:
    run = folder.path.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "clip/summary": 1.0}) + "\n")
    folder.add("mine", "scenes:clip")
    folder.add("mine", "pip:gone")
    page = folder.path.parent / "page.html"
    assert write_page(folder.path, page, run=run, models=["scenes:sam"]) < 1_000_000
    read = Reader(page.read_text(encoding="utf-8"))
    assert "training: run, 1 steps" in read.text and "summary loss" in read.text
    assert "96 x 96 px, 8 x 8 tokens" in read.text and "112 x 112 px, 14 x 14 tokens" in read.text
    assert [tag for tag, _ in read.tags].count("img") == 18  # six images and two models' maps
    assert "pip:gone is not shown: " in read.text and "run holds no ckpt.pt" in read.text


def test_bad_input_is_one_clear_error(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no reports"):
        write_page(folder.path, tmp_path / "page.html")
    with pytest.raises(DataError, match="no such folder of reports"):
        write_page(tmp_path / "nowhere", tmp_path / "page.html")
    folder.add("knn", "a")
    with pytest.raises(ConfigError, match=r"is a folder; name the HTML file, such as .*report\.html"):
        write_page(folder.path, tmp_path)
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl"):
        write_page(folder.path, tmp_path / "page.html", run=folder.path)
    with pytest.raises(ConfigError, match="did you mean clip"):
        write_page(folder.path, tmp_path / "page.html", models=["scenes:clop"])
    (folder.path / "knn-b.json").write_text("{")
    with pytest.raises(DataError, match=r"knn-b\.json: is not JSON"):
        write_page(folder.path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_without_jinja2_the_extra_is_named(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    folder.add("knn", "a")
    with pytest.raises(MissingExtraError, match=r"am-radio\[report\]"):
        write_page(folder.path, tmp_path / "page.html")


def test_the_command_writes_the_page_and_says_its_size(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.add("knn", "a")
    page = tmp_path / "out" / "page.html"
    assert entry.evaluate(["report", str(folder.path), "--html", str(page), "--no-maps"]) == 0
    assert capsys.readouterr().out == f"{page}: {page.stat().st_size / 1e6:.2f} MB\n"
    assert entry.evaluate(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder of reports" in capsys.readouterr().err


def test_many_metrics_stand_below_one_another(folder: Folder) -> None:
    many = {"accuracy": metric(50.0), **{f"part_{place}": metric(float(place)) for place in range(20)}}
    data = tuple(DataUsed(role="questions", name=n, fingerprint=n, count=5, num_classes=0) for n in "abcd")
    for model in ("x", "y"):
        folder.add("vqa", model, primary_metric="accuracy", metrics=many, data=data)
    page = read_page(folder)
    rows = page.table("All metrics")
    assert rows[0] == ["metric", "x", "y"] and rows[1] == ["accuracy (%)", "50.0 ±2.0", "50.0 ±2.0"]
    assert len(rows) == 22 and "4 data sets, 20" in page.text

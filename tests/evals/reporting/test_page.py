"""The page: what is in it, what is escaped, and what happens when something is missing."""

from __future__ import annotations

import base64
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evals.core.blocks import Bars, Confusions, Example, Examples, ImageGrid, ImageRow, Table
from evals.core.blocks import Image as ImageFile
from evals.core.report import DatasetInfo, Metric
from evals.reporting.elements import ImageBudget
from evals.reporting.page import gather, overview, sorted_tasks, write_page
from radio import entry
from radio.errors import ConfigError, DataError, MissingExtraError
from radio.images import decode

from .conftest import Folder, metric

NASTY = "<script>alert(\"x\")</script> & '😀'"


class Reader(HTMLParser):
    """The text of a page, its tables, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.titles: list[str] = []  # of plots
        self.legends: list[list[str]] = []
        self.collapsed: list[str] = []  # summaries
        self._path: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self._in_legend = False
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
        elif tag == "ul":
            self._in_legend = dict(attrs).get("class") == "legend"
            self.legends += [[]] if self._in_legend else []
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "ul":
            self._in_legend = False
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows
        if tag in self._path:
            while self._path.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self._path or "script" in self._path:
            return
        self.text += data
        place = self._path[-1] if self._path else ""
        if place == "h3":
            self.titles.append(data)
        elif place == "summary":
            self.collapsed.append(data)
        elif place == "li" and self._in_legend and data.strip():
            self.legends[-1].append(data)
        if "caption" in self._path:
            self._caption += data
        elif "small" not in self._path and ("td" in self._path or "th" in self._path):
            self._rows[-1][-1] += data.strip()

    def table(self, start: str) -> list[list[str]]:
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return found


def read_page(folder: Folder, **options: Any) -> Reader:
    path = folder.path.parent / "page.html"
    size = write_page(folder.path, path, **options)
    assert size == path.stat().st_size
    return Reader(path.read_text(encoding="utf-8"))


def test_the_overview_has_a_row_a_model_a_column_a_task_and_the_paper_apart(folder: Folder) -> None:
    knn: dict[str, Any] = {"title": "k-NN", "baselines": {"chance": 25.0}}
    folder.add("knn", "scenes:clip", metrics={"top1": metric(90.0)}, kind="teacher", **knn)
    folder.add("knn", "demo", metrics={"top1": metric(85.0)}, fingerprint="same", **knn)
    folder.add("knn", "demo-untrained", metrics={"top1": metric(10.0)}, kind="untrained", **knn)
    folder.add(
        "sam",
        "student",
        title="SAM drop-in",
        primary_metric="miou",
        metrics={"miou": metric(80.0)},
        baselines={"filled_box": 53.7, "other": 1.0},
        fingerprint="same",
    )
    folder.add("ridge", "student", fingerprint="same")
    page = read_page(folder)
    head, *rows = page.table("Every model on every task")
    assert head == ["model", "kind", "k-NN: top1 (%)", "SAM drop-in: miou (%)", "ridge: top1 (%)"]
    assert rows == [
        ["student", "student", "85.0 ±2.0", "80.0 ±2.0", "75.0 ±13.0"],
        ["scenes:clip", "teacher", "90.0 ±2.0", "", ""],
        ["demo-untrained", "untrained", "10.0 ±2.0", "", ""],
        ["baseline", "baseline", "25.0", "53.7", ""],
        ["RADIO ViT-H/14", "paper", "85.29", "", ""],
        ["RADIO ViTDet-H/14, window 18", "paper", "", "75.42", ""],
    ]
    assert "also demo" in page.text and "AM-RADIO, CVPR 2024, table 7" in page.text
    assert "ImageNet-1k, k = 20, top-1" in page.text
    assert "chance" in page.text and "filled box" in page.text


def test_names_are_one_model_only_with_the_same_weights_and_no_task_in_common(folder: Folder) -> None:
    reports = [
        folder.add("knn", "demo", fingerprint="w"),
        folder.add("knn", "demo-clip-head", fingerprint="w"),
        folder.add("seg", "other", fingerprint="w"),
        folder.add("seg", "third", fingerprint="v"),
        folder.add("vqa", "predictions", fingerprint=""),
        folder.add("vqa", "others", fingerprint=""),
    ]
    models = {model.name: model.also for model in gather(reports)}
    assert models == {
        "other": ("demo",), "demo-clip-head": (), "third": (), "predictions": (), "others": ()
    }  # fmt: skip


def test_popes_report_leaves_a_students_two_names_together(folder: Folder) -> None:
    """A training scores `student`, later commands `demo`; VQA's second report is another way of scoring."""
    reports = [
        folder.add("knn", "student", fingerprint="w"),
        folder.add("vqa", "student", fingerprint="w"),
        folder.add("linear", "demo", fingerprint="w"),
        folder.add("vqa", "demo-pope", fingerprint="w"),
    ]
    models = {model.name: model.also for model in gather(reports)}
    assert models == {"student": ("demo",), "demo-pope": ()}


def test_scores_on_other_data_stand_in_a_column_of_their_own(folder: Folder) -> None:
    bank = DatasetInfo(role="bank", name="b", fingerprint="c", count=9, num_classes=4, scored=False)
    other = DatasetInfo(role="query", name="cifar", fingerprint="b" * 64, count=10, num_classes=10)
    reports = [
        folder.add("knn", "demo"),
        folder.add("knn", "pip:efficientnet-lite0", data=(bank, other), kind="teacher"),
    ]
    grid = overview(gather(reports), sorted_tasks(reports))
    assert [(column.name, column.small) for column in grid.columns[2:]] == [
        ("knn: top1 (%)", "d, 40"),
        ("knn: top1 (%)", "cifar, 10"),
    ]
    assert [[cell.text for cell in row[2:]] for row in grid.rows] == [["75.0 ±13.0", ""], ["", "75.0 ±13.0"]]
    page = read_page(folder)
    assert "not made alike: query data is d (40, aaaaaaaaaaaa) or cifar (10, bbbbbbbbbbbb)" in page.text


def test_tasks_stand_in_the_papers_order_and_others_by_name(folder: Folder) -> None:
    reports = [folder.add(task, "a") for task in ("ridge", "vqa", "maps", "knn", "zeroshot")]
    assert sorted_tasks(reports) == ["zeroshot", "knn", "vqa", "maps", "ridge"]


def test_settings_that_differ_are_noted(folder: Folder) -> None:
    folder.add("knn", "a", settings={"seed": 0, "limit": None, "batch": 4}, machine_settings=("batch",))
    folder.add("knn", "b", settings={"seed": 0, "limit": 200, "batch": 8}, machine_settings=("batch",))
    page = read_page(folder)
    assert "not made alike: limit is null or 200" in page.text
    assert page.text.count("not made alike") == 1
    assert "batch is" not in page.text


def test_a_task_that_nobody_knows_has_all_of_its_blocks_on_the_page(folder: Folder) -> None:
    for model, value in (("a", 60.0), ("b", 90.0)):
        folder.add("ridge", model, title="ridge regression", blocks=folder.blocks(model, value))
    page = read_page(folder)
    assert page.table("All metrics")[1:] == [["a", "75.0 ±13.0"], ["b", "75.0 ±13.0"]]
    assert page.table("top-1 of each class: top1 (%).") == [
        ["class", "count", "a", "b"],
        ["class 2", "12", "20", "30"],  # the lowest of the first model on top
        ["class 1", "11", "30", "45"],
        ["class 0", "10", "60", "90"],
    ]
    assert page.table("a: largest weights") == [["weight", "size"], ["w", "0.5"], ["v", "2"]]
    assert page.table("confusions") == [
        ["class", "taken for", "a", "b"],
        ["a", "b", "5", "5"],
        ["b", "a a", "2", ""],  # the first model's alone
    ]
    titles = [words for words in page.titles if words]
    assert titles == [
        "accuracy over k",
        "colors",
        "top-1 of each class, lowest first (by a)",
    ]
    assert [tag for tag, _ in page.tags].count("svg") == 3
    assert page.legends == [["a", "b"]] * 2  # curves, then bars, each with one legend
    assert page.collapsed == [
        "top-1 of each class",
        "a: largest weights",
        "b: largest weights",
        "b: wrong ones",
        "b: maps",
        "how each report was made: settings, data, versions",
        "a",
        "b",
    ]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12 and {(i["width"], i["height"]) for i in images} == {("96", "64")}
    assert all((image["src"] or "").startswith("data:image/png;") for image in images)
    assert "without an image" in page.text and "label 1" in page.text and "8 x 8" in page.text


def test_the_folder_can_be_moved(folder: Folder) -> None:
    folder.add("ridge", "a", blocks=folder.blocks("a", 50.0))
    before = read_page(folder)
    folder.path = folder.path.rename(folder.path.parent / "elsewhere")
    after = read_page(folder)
    assert [t for t in before.tags if t[0] == "img"] == [t for t in after.tags if t[0] == "img"]


def test_blocks_that_one_model_lacks_are_drawn_for_the_others(folder: Folder) -> None:
    first, *_ = folder.blocks("a", 50.0)
    folder.add("ridge", "a", blocks=())
    folder.add("ridge", "b", blocks=(first, Confusions(title="confusions", rows=())))
    folder.add("ridge", "c", blocks=(first, Confusions(title="confusions", rows=(("x", "y", 1),))))
    page = read_page(folder)
    assert page.titles == ["accuracy over k"]
    assert page.table("confusions: the commonest of c") == [
        ["class", "taken for", "b", "c"],
        ["x", "y", "", "1"],
    ]


def test_of_many_classes_the_lowest_are_shown(folder: Folder) -> None:
    rows = tuple((f"class {n}", float(200 - n)) for n in range(150))
    table = Table(title="IoU", columns=("class", "iou"), rows=rows, compared="iou")
    names = tuple(f"bar {n}" for n in range(40))
    bars = Bars(title="many", x_label="%", names=names, values=(1.0,) * 40)
    folder.add("ridge", "a", blocks=(table, bars))
    page = read_page(folder)
    listed = page.table("IoU: iou (%). The 100 lowest of 150.")
    assert len(listed) == 101 and listed[1] == ["class 149", "51"]
    assert page.titles == ["IoU, the 30 lowest of 150 (by a)", "many"]
    assert "bar 29" in page.text and "bar 30" not in page.text


def test_images_that_are_missing_foreign_or_outside_are_noted(folder: Folder) -> None:
    outside = folder.image("../outside.png")
    (folder.path / "text.png").write_text("no image")
    names = ("gone.png", "../outside.png", "text.png", "a\0b.png", "x" * 300)
    images = (*(ImageFile(file=name, alt=name) for name in names), folder.image("there.png"))
    assert outside.file == "../outside.png"
    folder.add("ridge", "a", blocks=(ImageGrid(title="maps", rows=(ImageRow(images=images),)),))
    page = read_page(folder)
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == ["there"]
    for note in (
        "a: gone.png is not there",
        "outside.png is not inside the folder",
        "text.png: not an image",
    ):
        assert note in page.text


def test_links_do_not_lead_out_of_the_folder(folder: Folder) -> None:
    folder.image("../secret.png")
    (folder.path / "link.png").symlink_to(folder.path.parent / "secret.png")
    row = ImageRow(images=(ImageFile(file="link.png", alt="link"),))
    folder.add("ridge", "a", blocks=(ImageGrid(title="maps", rows=(row,)),))
    page = read_page(folder)
    assert "link.png is not there" in page.text and not [tag for tag, _ in page.tags if tag == "img"]


def test_of_many_examples_and_images_the_first_are_shown(folder: Folder) -> None:
    image = folder.image("noise.png", (8, 8))
    examples = Examples(
        title="wrong", examples=(Example(image=image, lines=("x",), others=(image,) * 40),) * 30
    )
    maps = ImageGrid(title="maps", rows=(ImageRow(images=(image,) * 40),) * 30)
    folder.add("ridge", "a", blocks=(examples,))
    folder.add("ridge", "b", blocks=(maps,))
    page = read_page(folder)
    assert "a: wrong (the first 24 of 30)" in page.text and "b: maps (the first 24 of 30)" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 24 * 25 + 24 * 24


def test_rates_are_bars_of_speed(folder: Folder) -> None:
    metrics = {"miou": metric(50.0), "encoder_rate": Metric(value=9.0, unit="images/s")}
    folder.add("ridge", "a", primary_metric="miou", metrics=metrics)
    page = read_page(folder)
    assert page.titles == ["speed"] and "images/s" in page.text


def test_what_comes_from_data_is_text(folder: Folder) -> None:
    folder.add(
        "ridge", NASTY, primary_metric="miou", metrics={"miou": metric(1.0)}, title=NASTY,
        notes=(NASTY,), settings={NASTY: NASTY}, device=NASTY, blocks=folder.blocks("a", 5.0, NASTY),
        data=(DatasetInfo(role=NASTY, name=NASTY, fingerprint="a", count=1, num_classes=2),),
        baselines={NASTY: 1.0},
    )  # fmt: skip
    page = read_page(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1  # our own
    assert page.text.count(NASTY) > 25


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
    write_page(folder.path, first)
    write_page(folder.path, second)
    assert first.read_bytes() == second.read_bytes()


def test_images_stop_where_the_page_is_full(folder: Folder) -> None:
    image_budget = ImageBudget(most_bytes=20_000)
    image = folder.image("noise.png", (32, 32))
    kept = [shown for _ in range(20) if (shown := image_budget.embed(folder.path, image)) is not None]
    assert 0 < len(kept) < 20 and image_budget.left_out == 20 - len(kept)
    assert sum(len(shown.src) for shown in kept) <= 20_000


def test_an_image_is_embedded_as_it_is_unless_it_is_far_too_large(folder: Folder) -> None:
    small = ImageBudget().embed(folder.path, folder.image("maps/8.png", (8, 4), side=112))
    assert small is not None and (small.width, small.height, small.crisp) == (112, 56, True)
    content = base64.b64encode((folder.path / "maps/8.png").read_bytes()).decode()
    assert small.src == f"data:image/png;base64,{content}"
    large = ImageBudget().embed(folder.path, folder.image("large.png", (800, 200), side=100))
    assert large is not None and (large.width, large.height, large.crisp) == (100, 25, False)
    kind, _, encoded = large.src.partition(",")
    assert kind == "data:image/webp;base64"
    assert decode(base64.b64decode(encoded)).shape == (3, 50, 200)


def test_curves_come_with_a_run(folder: Folder) -> None:
    run = folder.path.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "clip/summary": 1.0}) + "\n")
    folder.add("mine", "scenes:clip")
    page = read_page(folder, run=run)
    assert "training: run, 1 steps" in page.text and "summary loss" in page.text


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
    assert entry.evaluate(["report", str(folder.path), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: {page.stat().st_size / 1e6:.2f} MB\n"
    assert entry.evaluate(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder of reports" in capsys.readouterr().err


def test_many_metrics_stand_below_one_another(folder: Folder) -> None:
    many = {"accuracy": metric(50.0), **{f"part_{place}": metric(float(place)) for place in range(20)}}
    data = tuple(DatasetInfo(role="questions", name=n, fingerprint=n, count=5, num_classes=0) for n in "abcd")
    for model in ("x", "y"):
        folder.add("vqa", model, primary_metric="accuracy", metrics=many, data=data)
    page = read_page(folder)
    rows = page.table("All metrics")
    assert rows[0] == ["metric", "x", "y"] and rows[1] == ["accuracy (%)", "50.0 ±2.0", "50.0 ±2.0"]
    assert len(rows) == 22 and "4 data sets, 20" in page.text

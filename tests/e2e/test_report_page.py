"""The page in a browser: Debian's chromium, driven by Playwright, without a network."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.core.report import DataUsed, Metric, Report, Table, file_name, write
from evals.reporting.html import write_page
from radio.data import open_source

NASTY = (
    """<img src=x onerror="document.title='caught'"> <script>document.title='caught'</script> & '😀' $a_b$"""
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser; its absence fails the tests in continuous integration, where it is installed."""
    found = shutil.which("chromium")
    if found is None:
        message = "chromium is not installed; on Debian: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    return found


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of several tasks and models, with every kind of block and names that try to break out."""
    root = tmp_path_factory.mktemp("page")
    folder, run = root / f"reports {NASTY[:4]}", root / "run"
    folder.mkdir()
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 1 / s, f"{NASTY}/summary": 1 / s}) + "\n" for s in (1, 2, 3))
    )
    for value, model in ((70.0, "demo"), (90.0, "scenes:clip"), (10.0, "demo-untrained"), (50.0, NASTY)):
        write_knn(folder, model, value)
        write_dense(folder, model, value)
    path = root / "page.html"
    size = write_page(folder, path, run=run, models=["scenes:clip"])
    assert size <= 3_000_000
    return path


def save(folder: Path, task: str, model: str, value: float, primary_metric: str, **changes: Any) -> None:
    metric = Metric(value=value, low=value - 1, high=value + 1)
    values: dict[str, Any] = {
        "fingerprint": model,
        "primary_metric": primary_metric,
        "metrics": {
            primary_metric: metric,
            "top1_k10": metric,
            "encoder_rate": Metric(value=value, unit="images/s"),
        },
        "settings": {NASTY: NASTY},
        "data": (),
        "device": NASTY,
        "seconds": {"total": 1.0},
        "created": "2026-01-02T00:00:00+00:00",
        "versions": {NASTY: NASTY},
        "notes": (NASTY,),
    }
    report = Report(task=task, model=model, **{**values, **changes})
    write(report, folder / f"{file_name(task, model)}-{int(value)}.json")


def write_knn(folder: Path, model: str, value: float) -> None:
    sources = {
        role: open_source(f"scenes:{split}", scenes=8)
        for role, split in (("bank", "train"), ("query", "val"))
    }
    records = [
        {
            "key": f"val/{index:06d}",
            "label": NASTY,
            "predictions": [f"{index} {NASTY}"],
            "neighbours": [f"train/{near:06d}" for near in range(5)],
            "similarities": [0.9] * 5,
        }
        for index in range(8)
    ]
    name = f"knn-{int(value)}-{NASTY.replace('/', '')}.jsonl"
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = {"k": [10, 20], "bank": None, "query": None, "scenes": [8, 8], "seed": 0, NASTY: NASTY}
    data = tuple(
        DataUsed(role=role, name=source.name, fingerprint=source.fingerprint, count=8, num_classes=60)
        for role, source in sources.items()
    )
    save(folder, "knn", model, value, "top1", settings=settings, data=data, files=(name,))


def write_dense(folder: Path, model: str, value: float) -> None:
    name = f"{int(value)}-{NASTY.replace('/', '')}-overlay.png"
    noise = np.random.default_rng(0).integers(0, 255, (96, 296, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    rows = tuple((f"{place} {NASTY}", 10.0 * place, 1.0) for place in range(6))
    table = Table(columns=("class", "iou", "share"), rows=rows)
    save(folder, "seg", model, value, "miou", tables={"classes": table, NASTY: table}, files=(name,))


@pytest.fixture
def open_page(chromium: str, page_file: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page in an empty profile; whatever it asks for or complains of ends up in `heard`."""
    from playwright.sync_api import sync_playwright

    heard: list[str] = []
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=chromium, args=FLAGS
        )

        def open_page(width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
            page = context.new_page()
            page.on("console", lambda message: heard.append(message.text))
            page.on("pageerror", lambda error: heard.append(str(error)))
            page.on("dialog", lambda dialog: heard.append(dialog.message))
            page.route("**/*", lambda route: _only_the_file(route, heard))
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme)
            page.goto(page_file.as_uri())
            return page, heard

        yield open_page
        context.close()


def _only_the_file(route: Any, heard: list[str]) -> None:
    if route.request.url.startswith("data:") or route.request.is_navigation_request():
        route.continue_()
        return
    heard.append(route.request.url)
    route.abort()


def test_it_loads_alone_with_all_images_and_nasty_names_as_text(open_page: Callable[..., Any]) -> None:
    page, heard = open_page()
    broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)")
    assert broken == [] and page.evaluate("document.images.length") > 50
    assert (
        page.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))")
        == []
    )
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0
    assert page.title() != "caught" and NASTY in page.text_content("main")
    assert heard == []


def test_a_table_is_sorted_by_keyboard_and_the_paper_stays_below(open_page: Callable[..., Any]) -> None:
    page, heard = open_page()
    table = page.locator("#overview table")
    names = table.locator("tbody").first.locator("th")
    before = names.all_inner_texts()
    button = table.locator("thead button").nth(2)
    button.focus()
    page.keyboard.press("Enter")
    head = table.locator("thead th").nth(2)
    assert head.get_attribute("aria-sort") == "descending"
    after = names.all_inner_texts()
    assert (after[:2], after[3:]) == (["scenes:clip", "demo"], ["demo-untrained"])
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "ascending"
    assert names.all_inner_texts()[0] == "demo-untrained" and names.all_inner_texts()[-1] == "scenes:clip"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert [each.get_attribute("aria-sort") for each in table.locator("thead th").all()][:3] == [
        "ascending",
        "none",
        "none",
    ]
    assert sorted(names.all_inner_texts()) == sorted(before)
    kinds = table.locator("tbody").last.locator("td:nth-child(2)").all_inner_texts()
    assert kinds[-1] == "paper"
    assert page.locator("table").count() == page.locator("table > caption").count() > 5
    assert page.locator("tbody tr > th[scope=row]").count() == page.locator("tbody tr").count()
    assert heard == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only_and_the_colours_can_be_told_apart(
    open_page: Callable[..., Any], scheme: str
) -> None:
    page, heard = open_page(390, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ink, paper = page.evaluate(
        "(s => [s.color, s.backgroundColor].map(c => c.match(/[0-9]+/g).map(Number)))"
        "(getComputedStyle(document.body))"
    )
    assert (sum(ink) < sum(paper)) is (scheme == "light")
    assert contrast(ink, paper) > 7
    link = page.evaluate(
        "getComputedStyle(document.querySelector('nav a')).color.match(/[0-9]+/g).map(Number)"
    )
    assert contrast(link, paper) > 4.5
    drawn = page.evaluate(
        "getComputedStyle(document.querySelector('.panel svg text')).fill.match(/[0-9]+/g).map(Number)"
    )
    assert drawn == ink
    assert heard == []


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2's contrast ratio of two sRGB colours."""

    def light(colour: list[int]) -> float:
        parts = [value / 255 for value in colour[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)

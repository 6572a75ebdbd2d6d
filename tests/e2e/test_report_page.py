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

from evals.core.blocks import (
    Bars,
    Block,
    Confusions,
    Example,
    Examples,
    ImageGrid,
    ImageRow,
    Lines,
    Table,
)
from evals.core.blocks import Image as ImageFile
from evals.core.report import Kind, Metric, Report, file_name, write
from evals.reporting.page import write_page

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
    kinds: dict[str, Kind] = {"scenes:clip": "teacher", "demo-untrained": "untrained"}
    for value, model in ((70.0, "demo"), (90.0, "scenes:clip"), (10.0, "demo-untrained"), (50.0, NASTY)):
        for task, metric in (("knn", "top1"), (NASTY, "miou")):
            save(folder, task, model, value, metric, kinds.get(model, "student"))
    path = root / "page.html"
    size = write_page(folder, path, run=run)
    assert size <= 3_000_000
    return path


def save(folder: Path, task: str, model: str, value: float, primary_metric: str, kind: Kind) -> None:
    """Write a report with a block of every kind."""
    metric = Metric(value=value, low=value - 1, high=value + 1)
    name = f"{len(task)}-{int(value)}-{NASTY.replace('/', '')}"
    report = Report(
        task=task,
        model=model,
        fingerprint=model,
        primary_metric=primary_metric,
        metrics={
            primary_metric: metric,
            "top1_k10": metric,
            "encoder_rate": Metric(value=value, unit="images/s"),
        },
        settings={NASTY: NASTY},
        data=(),
        device=NASTY,
        seconds={"total": 1.0},
        created="2026-01-02T00:00:00+00:00",
        versions={NASTY: NASTY},
        notes=(NASTY,),
        kind=kind,
        baselines={NASTY: 5.0},
        blocks=blocks(folder, name, value),
    )
    write(report, folder / f"{file_name(task, model)}-{int(value)}.json")


def blocks(folder: Path, name: str, value: float) -> tuple[Block, ...]:
    overlay = draw_image(folder, f"{name}-overlay.png", (296, 96), 340)
    thumbs = [draw_image(folder, f"{name}-{number}.png", (96, 96), 56) for number in range(6)]
    maps = [draw_image(folder, f"{name}-map-{number}.png", (8, 8), 112) for number in range(6)]
    examples = tuple(
        Example(image=image, lines=(f"{NASTY}, taken for {NASTY}", NASTY), others=tuple(thumbs), good=False)
        for image in (thumbs[0], None, thumbs[1])
    )
    rows = tuple((f"{place} {NASTY}", 10 * place, 10.0 * place) for place in range(6))
    return (
        Lines(title=NASTY, x_label="k", y_label=NASTY, x=(5, 20), y=(value, 50.0), log_x=True),
        Bars(title=NASTY, x_label="%", names=(NASTY, "all"), values=(value, 10.0)),
        Table(title="classes", columns=("class", "share", "iou"), rows=rows, compared="iou", shared="share"),
        Table(title=NASTY, columns=(NASTY, "n", "m"), rows=rows),
        Confusions(title=NASTY, rows=((NASTY, f"1 {NASTY}", 3), (NASTY, f"2 {NASTY}", 1))),
        Examples(title=NASTY, examples=examples),
        ImageGrid(
            title="overlays and maps",
            rows=(ImageRow(images=(overlay,)), ImageRow(images=tuple(maps), name=NASTY, note=NASTY)),
        ),
    )


def draw_image(folder: Path, name: str, size: tuple[int, int], side: int) -> ImageFile:
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(folder / name)
    return ImageFile(file=name, alt=name, label=NASTY, good=side > 100, side=side)


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

"""A folder of reports as one HTML file that works anywhere: no network, no other file, any browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radio.errors import ConfigError, require
from radio.io import write_text

from .answers import vqa_blocks
from .blocks import Block, ImageRow, LegendEntry, Panel, Plots, Section, Strips, Thumbnail, notes
from .classification import knn_blocks, query_images, zeroshot_blocks
from .compare import read_reports
from .curves import read_curves
from .dense import plain_blocks, sam_blocks, seg_blocks
from .figures import lines
from .images import ImageBudget
from .overview import Model, gather, overview, sorted_tasks
from .pca import Maps, draw_maps
from .records import Entry
from .sections import Builder, Scored, section_of

_TEMPLATES = Path(__file__).parent / "templates"
_BUILDERS: Mapping[str, Builder] = {
    "knn": knn_blocks,
    "zeroshot": zeroshot_blocks,
    "seg": seg_blocks,
    "sam": sam_blocks,
    "vqa": vqa_blocks,
}
_WITHOUT_FILE = ("scenes:", "pip:")  # families whose weights need no file
_NUM_MAPS = 6  # images whose features are shown
_MAP = 112  # a map's side on the page in pixels
_MOST_CURVES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The content that the template renders."""

    title: str
    subtitle: str
    overview: Section
    sections: tuple[Section, ...]


def write_page(
    folder: Path, path: Path, *, run: Path | None = None, models: Sequence[str] = (), images: bool = True
) -> int:
    """Write the page of a folder of reports atomically; return its size in bytes.

    Args:
        folder: of reports, with the files that they name.
        path: the HTML file.
        run: a run folder of the trainer: its curves, and its student's feature maps.
        models: further models whose feature maps are shown.
        images: draw the feature maps.

    Raises:
        DataError: a folder without reports, a damaged report, or a run folder without metrics.
        ConfigError: a path that is a folder, or an unknown model.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):  # a missing one is reported before the long part
        require(module, extra="report")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the HTML file, such as {path / 'report.html'}")
    text = render(make_page(folder, run=run, models=models, images=images))
    write_text(path, text)
    return len(text.encode())


def make_page(
    folder: Path, *, run: Path | None = None, models: Sequence[str] = (), images: bool = True
) -> Page:
    """Build the page's content; see `write_page`."""
    entries = list(read_reports(folder).values())
    reports = [entry.report for entry in entries]
    curves = None if run is None else curves_section(run)  # a wrong run is reported before the long part
    tasks, known = sorted_tasks(reports), gather(reports)
    image_budget = ImageBudget()
    maps = maps_section(entries, known, run, models, image_budget) if images else None
    sections = task_sections(entries, known, tasks, image_budget)
    more = [section for section in (maps, curves) if section is not None]
    days = sorted({report.created[:10] for report in reports})
    if image_budget.left_out:
        left = f"{image_budget.left_out} images are left out: the page would be too large with them"
        more.append(Section(anchor="left-out", title="left out", blocks=notes([left])))
    return Page(
        title="/".join(folder.resolve().parts[-2:]).lstrip("/"),
        subtitle=f"{len(reports)} reports, made {' to '.join(dict.fromkeys((days[0], days[-1])))}",
        overview=Section(
            anchor="overview", title="every model on every task", blocks=(overview(known, tasks),)
        ),
        sections=(*sections, *more),
    )


def task_sections(
    entries: Sequence[Entry], models: Sequence[Model], tasks: Sequence[str], image_budget: ImageBudget
) -> list[Section]:
    """Build a section for each task, the models always in the same order and colours."""
    order = [name for model in models for name in (model.name, *model.also)]
    slots = {name: color for color, model in enumerate(models) for name in (model.name, *model.also)}
    found = []
    for task in tasks:
        mine = [entry for entry in entries if entry.report.task == task]
        mine.sort(key=lambda entry: order.index(entry.report.model))
        scored = Scored(task=task, entries=tuple(mine), slots=slots, image_budget=image_budget)
        found.append(section_of(scored, _BUILDERS.get(task, plain_blocks)))
    return found


def curves_section(run: Path) -> Section:
    """Build the section of a run's curves.

    Raises:
        DataError: a folder without metrics.
    """
    curves = read_curves(run)
    panels = tuple(
        Panel(title=curve.title, svg=lines(curve.series, name=f"run-{place}", x_label="step", y_label=""))
        for place, curve in enumerate(curves.panels[:_MOST_CURVES])
    )
    legend = tuple(LegendEntry(name=name, color=color) for color, name in enumerate(curves.teachers))
    caption = "Means between two log steps. A dashed line is measured, and weighs nothing in the loss."
    blocks: list[Block] = [*notes(curves.notes), Plots(caption=caption, panels=panels, legend=legend)]
    title = f"training: {run.resolve().name}, {curves.last_step} steps"
    return Section(anchor="training", title=title, blocks=tuple(blocks))


def maps_section(
    entries: Sequence[Entry],
    models: Sequence[Model],
    run: Path | None,
    specs: Sequence[str],
    image_budget: ImageBudget,
) -> Section | None:
    """Build the feature maps of the run's student, its teachers and other models on the same images.

    Teachers that the reports name and whose weights need no file are added.

    Raises:
        RadioError: one of `specs` names no model.
    """
    wanted, remarks = list(specs), []
    if run is not None and (run / "ckpt.pt").is_file():
        wanted.insert(0, str(run / "ckpt.pt"))
    elif run is not None:
        remarks.append(f"{run} holds no ckpt.pt, so its student's maps are not shown")
    names = [model.name for model in models if model.kind == "teacher"]
    optional = [name for name in names if name.startswith(_WITHOUT_FILE) and "@" not in name]
    if not wanted and not optional:
        return None
    shown, label = query_images([entry.report for entry in entries], _NUM_MAPS)
    maps, warnings = draw_maps(wanted, [image for _, image in shown], optional)
    strips = [
        _strip_of_images(shown, label, image_budget),
        *(_strip_of_maps(one, shown, image_budget) for one in maps),
    ]
    intro = (
        "The first three principal components of each model's tokens as red, green and blue, fitted over the "
        "images shown. Colours of two models say nothing of one another, except where a student stands "
        "along its teacher's axes: there equal colours are equal features."
    )
    caption = f"Feature maps on images of {label}; one square is one token."
    return Section(
        anchor="maps",
        title="spatial features",
        intro=intro,
        blocks=(
            *notes([*remarks, *warnings]),
            Strips(caption=caption, strips=tuple(s for s in strips if s.images)),
        ),
    )


def _strip_of_images(shown: Sequence[tuple[str, Any]], label: str, image_budget: ImageBudget) -> ImageRow:
    found = [image_budget.add(pixels, key, side=_MAP * 2, shown=_MAP) for key, pixels in shown]
    return ImageRow(name="images", note=label, images=_there(found))


def _strip_of_maps(maps: Maps, shown: Sequence[tuple[str, Any]], image_budget: ImageBudget) -> ImageRow:
    found = [
        image_budget.add(pixels, f"{maps.model}: {key}", side=_MAP * 2, shown=_MAP, exact=True)
        for (key, _), pixels in zip(shown, maps.images, strict=True)
    ]
    return ImageRow(name=maps.model, note=maps.note, images=_there(found))


def _there(found: Sequence[Thumbnail | None]) -> tuple[Thumbnail, ...]:
    return tuple(image for image in found if image is not None)


def render(page: Page) -> str:
    """Render a page as HTML.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "sort.js").read_text(encoding="utf-8")
    template = environment.get_template("page.html.j2")
    text: str = template.render(
        page=page,
        sections=list(page.sections),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_TEMPLATES / "style.css").read_text(encoding="utf-8"),
    )
    return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written

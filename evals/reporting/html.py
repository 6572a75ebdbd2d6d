"""A folder of reports as one HTML file that works anywhere: no network, no other file, any reader."""

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
from .blocks import Block, Key, Panel, Picture, Plots, Section, Strip, Strips, notes
from .classification import knn_blocks, query_pictures, zeroshot_blocks
from .compare import read_reports
from .curves import read_curves
from .dense import plain_blocks, sam_blocks, seg_blocks
from .figures import lines
from .overview import Model, gather, overview, sorted_tasks
from .pca import Maps, draw_maps
from .pictures import Album
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
_WITHOUT_FILE = ("scenes:", "pip:")  # families that bring their weights along
_NUM_MAPS = 6  # pictures whose features are shown
_MAP = 112  # pixels of one on the page
_MOST_CURVES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What the template gets."""

    title: str
    subtitle: str
    overview: Section
    sections: tuple[Section, ...]


def write_page(
    folder: Path, path: Path, *, run: Path | None = None, models: Sequence[str] = (), pictures: bool = True
) -> int:
    """Write the page of a folder of reports, atomically; its size in bytes.

    Args:
        folder: of reports, with the files that they name.
        path: the HTML file.
        run: a run folder of the trainer: its curves, and its student's feature maps.
        models: further models whose feature maps are shown.
        pictures: draw the feature maps.

    Raises:
        DataError: a folder without reports, a damaged report, or a run folder without metrics.
        ConfigError: a path that is a folder, or a model that nobody knows.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    for module in ("jinja2", "matplotlib"):  # an absence shows before the long part
        require(module, extra="report")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the HTML file, such as {path / 'report.html'}")
    text = render(make_page(folder, run=run, models=models, pictures=pictures))
    write_text(path, text)
    return len(text.encode())


def make_page(
    folder: Path, *, run: Path | None = None, models: Sequence[str] = (), pictures: bool = True
) -> Page:
    """The page's content; see `write_page`."""
    entries = list(read_reports(folder).values())
    reports = [entry.report for entry in entries]
    curves = None if run is None else curves_section(run)  # a wrong run shows before the long part
    tasks, known = sorted_tasks(reports), gather(reports)
    album = Album()
    maps = maps_section(entries, known, run, models, album) if pictures else None
    sections = task_sections(entries, known, tasks, album)
    more = [section for section in (maps, curves) if section is not None]
    days = sorted({report.created[:10] for report in reports})
    if album.left_out:
        left = f"{album.left_out} pictures are left out: the page would be too large with them"
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
    entries: Sequence[Entry], models: Sequence[Model], tasks: Sequence[str], album: Album
) -> list[Section]:
    """A section for each task, the models always in the same order and colours."""
    order = [name for model in models for name in (model.name, *model.also)]
    slots = {name: slot for slot, model in enumerate(models) for name in (model.name, *model.also)}
    found = []
    for task in tasks:
        mine = [entry for entry in entries if entry.report.task == task]
        mine.sort(key=lambda entry: order.index(entry.report.model))
        scored = Scored(task=task, entries=tuple(mine), slots=slots, album=album)
        found.append(section_of(scored, _BUILDERS.get(task, plain_blocks)))
    return found


def curves_section(run: Path) -> Section:
    """The curves of a run.

    Raises:
        DataError: a folder without metrics.
    """
    curves = read_curves(run)
    panels = tuple(
        Panel(title=curve.title, svg=lines(curve.series, name=f"run-{place}", x_label="step", y_label=""))
        for place, curve in enumerate(curves.panels[:_MOST_CURVES])
    )
    legend = tuple(Key(name=name, slot=slot) for slot, name in enumerate(curves.teachers))
    caption = "Means between two log steps. A dashed line is measured, and weighs nothing in the loss."
    blocks: list[Block] = [*notes(curves.notes), Plots(caption=caption, panels=panels, legend=legend)]
    title = f"training: {run.resolve().name}, {curves.last_step} steps"
    return Section(anchor="training", title=title, blocks=tuple(blocks))


def maps_section(
    entries: Sequence[Entry],
    models: Sequence[Model],
    run: Path | None,
    specs: Sequence[str],
    album: Album,
) -> Section | None:
    """The feature maps of the run's student, its teachers and other models on the same pictures.

    Also of the teachers that the reports name and that bring their weights along.

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
    shown, words = query_pictures([entry.report for entry in entries], _NUM_MAPS)
    maps, told = draw_maps(wanted, [picture for _, picture in shown], optional)
    strips = [_strip_of_pictures(shown, words, album), *(_strip_of_maps(one, shown, album) for one in maps)]
    intro = (
        "The first three principal components of each model's tokens as red, green and blue, fitted over the "
        "pictures shown. Colours of two models say nothing of one another, except where a student stands "
        "along its teacher's axes: there equal colours are equal features."
    )
    caption = f"Feature maps on pictures of {words}; one square is one token."
    return Section(
        anchor="maps",
        title="spatial features",
        intro=intro,
        blocks=(
            *notes([*remarks, *told]),
            Strips(caption=caption, strips=tuple(s for s in strips if s.pictures)),
        ),
    )


def _strip_of_pictures(shown: Sequence[tuple[str, Any]], words: str, album: Album) -> Strip:
    found = [album.add(pixels, key, side=_MAP * 2, shown=_MAP) for key, pixels in shown]
    return Strip(name="pictures", note=words, pictures=_there(found))


def _strip_of_maps(maps: Maps, shown: Sequence[tuple[str, Any]], album: Album) -> Strip:
    found = [
        album.add(pixels, f"{maps.model}: {key}", side=_MAP * 2, shown=_MAP, exact=True)
        for (key, _), pixels in zip(shown, maps.pictures, strict=True)
    ]
    return Strip(name=maps.model, note=maps.note, pictures=_there(found))


def _there(found: Sequence[Picture | None]) -> tuple[Picture, ...]:
    return tuple(picture for picture in found if picture is not None)


def render(page: Page) -> str:
    """The HTML of a page.

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

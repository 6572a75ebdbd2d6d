"""Segmentation and SAM's masks: bars of classes and sizes, and the images of the reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from radio.errors import DataError

from .blocks import Block, Collapsible, Gallery, Panel, Plots, notes
from .figures import Series, bars
from .images import read_image
from .records import Entry, drawn, read_records
from .sections import Scored, class_grid

_MOST_CLASSES = 30
_MOST_IMAGES = 9  # of one report
_SAM_SIZES = ("miou", "miou_small", "miou_medium", "miou_large", "boundary_miou", "filled_box_miou")


def seg_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """Build the probe's blocks; return them with the names of the tables that they show."""
    plots = _plots(scored, class_bars(scored, "classes", "iou", "IoU (%)"))
    grid = class_grid(scored.reports, "classes", "iou", "IoU of each class in percent.", count="share")
    table: list[Block] = [Collapsible(summary="class by class", blocks=(grid,))] if grid else []
    caption = "image, ground truth and prediction (void is clear in the truth and faint in the prediction)"
    shown = images(scored, caption, lambda name: name.endswith("-overlay.png"), side=640, wide=340)
    return [*plots, *table, *shown], frozenset({"classes"})


def sam_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """Build SAM's blocks; return them with the names of the tables that they show."""
    names = [name for name in _SAM_SIZES if any(name in report.metrics for report in scored.reports)]
    panels: list[Panel] = []
    if names:
        svg = bars(
            [name.removesuffix("_miou").removeprefix("miou_").replace("_", " ") for name in names],
            [scored.series(report, names) for report in scored.reports],
            name="sam-sizes",
            x_label="mIoU (%)",
        )
        panels.append(Panel(title="mIoU over all, by size, of boundaries, and of the box alone", svg=svg))
    panels += class_bars(scored, "categories", "miou", "mIoU (%)")
    caption = "Category by category: mIoU in percent."
    grid = class_grid(scored.reports, "categories", "miou", caption, count="instances")
    table: list[Block] = [Collapsible(summary="category by category", blocks=(grid,))] if grid else []
    caption = "prompt, ground truth and drawn mask"
    shown = images(scored, caption, _is_image, side=660, wide=480, label=_overlaps)
    return [*_plots(scored, panels), *table, *shown], frozenset({"categories"})


def plain_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """Build the images of a task that has no blocks of its own."""
    return images(scored, "images of the report", _is_image, side=640, wide=480), frozenset()


def _plots(scored: Scored, panels: Sequence[Panel]) -> list[Block]:
    caption = "Bars for each model; thin lines, where there are any, are 95 % intervals."
    return [Plots(caption=caption, panels=tuple(panels), legend=scored.legend())] if panels else []


def class_bars(scored: Scored, table: str, value: str, label: str) -> list[Panel]:
    """Build bars for each class and model; of many classes, the first model's lowest."""
    grid = class_grid(scored.reports, table, value, "")
    if grid is None:
        return []
    rows = grid.rows[:_MOST_CLASSES]
    models = [column.name for column in grid.columns[1:]]
    series = [
        Series(
            name=model,
            color=scored.slots[model],
            y=tuple(_value(row[place + 1].order) for row in rows),
        )
        for place, model in enumerate(models)
    ]
    names = [row[0].text for row in rows]
    svg = bars(names, series, name=f"{scored.task}-{table}", x_label=label)
    which = "lowest first" if len(rows) == len(grid.rows) else f"the {len(rows)} lowest of {len(grid.rows)}"
    return [Panel(title=f"{label} of each class, {which} (by {models[0]})", svg=svg)]


def images(
    scored: Scored,
    caption: str,
    wanted: Callable[[str], bool],
    *,
    side: int,
    wide: int,
    label: Callable[[Entry], Callable[[str], str]] | None = None,
) -> list[Block]:
    """Build galleries of the images that the reports name, all but the first model's collapsed.

    Args:
        wanted: selects files of a report by their names.
        side: the longer side in pixels, at most.
        wide: the longer side on the page in pixels.
        label: for a report, gives the text under an image by its file name.
    """
    warnings: list[str] = []
    found: list[Gallery] = []
    for entry in scored.entries:
        names = [name for name in entry.report.files if wanted(name)]
        say = (label or _by_name)(entry) if names else _plain
        shown = []
        for name, pixels in _read(entry, names, warnings):
            said = say(name)
            alt = f"{entry.report.model}, {said}"
            image = scored.image_budget.add(pixels, alt, side=side, shown=wide, label=said)
            shown += [image] if image is not None else []
        if shown:
            found.append(Gallery(caption=f"{entry.report.model}: {caption}.", images=tuple(shown), wide=True))
    folded = [Collapsible(summary=gallery.caption, blocks=(gallery,)) for gallery in found[1:]]
    return [*notes(warnings), *found[:1], *folded]


def _read(entry: Entry, names: Sequence[str], warnings: list[str]) -> list[tuple[str, Tensor]]:
    """Read images with their names; add a warning for those that cannot be read."""
    model, found = entry.report.model, []
    if len(names) > _MOST_IMAGES:
        warnings.append(f"{model}: {_MOST_IMAGES} of {len(names)} images are shown")
    for name in spread(names, _MOST_IMAGES):
        try:
            found.append((name, read_image(entry.path.parent, name)))
        except DataError as error:
            warnings.append(f"{model}: {error}")
    return found


def spread(names: Sequence[str], most: int) -> list[str]:
    """Select at most `most` of the names, evenly spread, in order."""
    count = min(len(names), most)
    return [names[place * len(names) // count] for place in range(count)]


def _overlaps(entry: Entry) -> Callable[[str], str]:
    """Return a function for the text under a panel of SAM: its kind, and its IoU from the records."""
    found, _ = read_records(entry, drawn)
    ious = {record.annotation: record.iou for records in found.values() for record in records}

    def label(name: str) -> str:
        parts = _plain(name).split("-")  # number, kind, image, annotation
        if len(parts) != 4 or parts[3] not in ious:
            return _plain(name)
        return f"{parts[1]}: IoU {100 * ious[parts[3]]:.1f}, image {parts[2]}"

    return label


def _by_name(entry: Entry) -> Callable[[str], str]:
    return _plain


def _plain(name: str) -> str:
    """Return a file's name for people: without folder and ending."""
    return name.rsplit("/", 1)[-1].removesuffix(".png").removesuffix("-overlay")


def _is_image(name: str) -> bool:
    return name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))


def _value(order: float | str | None) -> float | None:
    return order if isinstance(order, (int, float)) else None

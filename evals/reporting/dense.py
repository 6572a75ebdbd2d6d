"""Segmentation and SAM's masks: bars of classes and sizes, and the pictures that the reports brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from radio.errors import RadioError

from .blocks import Block, Folded, Gallery, Panel, Picture, Plots, notes
from .compare import Entry
from .figures import Series, bars
from .pictures import read_picture
from .sections import Scored, class_grid

_MOST_CLASSES = 30
_MOST_PICTURES = 9  # of one report
_SAM_SIZES = ("miou", "miou_small", "miou_medium", "miou_large", "boundary_miou", "filled_box_miou")


def seg_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """IoU of each class, overlays."""
    plots = class_bars(scored, "classes", "iou", "IoU (%)")
    grid = class_grid(scored.reports, "classes", "iou", "IoU of each class in percent.", count="share")
    table: list[Block] = [Folded(summary="class by class", blocks=(grid,))] if grid else []
    caption = "picture, ground truth and prediction (void is clear in the truth and faint in the prediction)"
    shown = pictures(scored, caption, lambda name: name.endswith("-overlay.png"), side=640, wide=340)
    return [*plots, *table, *shown], frozenset({"classes"})


def sam_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """IoU by size and category, panels."""
    names = [name for name in _SAM_SIZES if any(name in report.metrics for report in scored.reports)]
    plots: list[Block] = []
    if names:
        svg = bars(
            [name.removesuffix("_miou").removeprefix("miou_").replace("_", " ") for name in names],
            [scored.series(report, names) for report in scored.reports],
            name="sam-sizes",
            x_label="mIoU (%)",
        )
        caption = (
            "mIoU over all instances and by size, of boundaries, and of the prompt's box taken as the mask."
        )
        plots = [Plots(caption=caption, panels=(Panel(title="by size", svg=svg),), legend=scored.legend())]
    plots += class_bars(scored, "categories", "miou", "mIoU (%)")
    caption = "Category by category: mIoU in percent."
    grid = class_grid(scored.reports, "categories", "miou", caption, count="instances")
    table: list[Block] = [Folded(summary="category by category", blocks=(grid,))] if grid else []
    shown = pictures(scored, "prompt, ground truth and drawn mask", _is_picture, side=660, wide=480)
    return [*plots, *table, *shown], frozenset({"categories"})


def plain_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """The pictures of a task that this page knows nothing else of."""
    return pictures(scored, "pictures of the report", _is_picture, side=640, wide=480), frozenset()


def class_bars(scored: Scored, table: str, value: str, label: str) -> list[Block]:
    """Bars for each class and model; of many classes, those that the first model does worst."""
    grid = class_grid(scored.reports, table, value, "")
    if grid is None:
        return []
    rows = grid.rows[:_MOST_CLASSES]
    models = [column.name for column in grid.columns[1:]]
    series = [
        Series(
            name=model,
            slot=scored.slots[model],
            y=tuple(_value(row[place + 1].order) for row in rows),
        )
        for place, model in enumerate(models)
    ]
    names = [row[0].text for row in rows]
    svg = bars(names, series, name=f"{scored.task}-{table}", x_label=label)
    which = "lowest first" if len(rows) == len(grid.rows) else f"the {len(rows)} lowest of {len(grid.rows)}"
    caption = f"{label} of each class, {which} (by {models[0]})."
    legend = tuple(key for key in scored.legend() if key.name in models)
    return [Plots(caption=caption, panels=(Panel(title=f"{label} by class", svg=svg),), legend=legend)]


def pictures(
    scored: Scored, caption: str, wanted: Callable[[str], bool], *, side: int, wide: int
) -> list[Block]:
    """The pictures that the reports name, the first model's unfolded."""
    told: list[str] = []
    found: list[Gallery] = []
    for entry in scored.entries:
        shown = _read(entry, [name for name in entry.report.files if wanted(name)], scored, told, side, wide)
        if shown:
            found.append(
                Gallery(caption=f"{entry.report.model}: {caption}.", pictures=tuple(shown), wide=True)
            )
    first, rest = found[:1], found[1:]
    folded = [Folded(summary=gallery.caption, blocks=(gallery,)) for gallery in rest]
    return [*notes(told), *first, *folded]


def _read(
    entry: Entry, names: Sequence[str], scored: Scored, told: list[str], side: int, wide: int
) -> list[Picture]:
    report = entry.report
    if len(names) > _MOST_PICTURES:
        told.append(f"{report.model}: {_MOST_PICTURES} of {len(names)} pictures are shown")
    shown = []
    for name in spread(names, _MOST_PICTURES):
        words = _words(name)
        try:
            pixels = read_picture(entry.path.parent, name)
        except RadioError as error:
            told.append(f"{report.model}: {error}")
            continue
        picture = scored.album.add(pixels, f"{report.model}, {words}", side=side, shown=wide, words=words)
        shown += [picture] if picture is not None else []
    return shown


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spread, in order."""
    count = min(len(names), most)
    return [names[place * len(names) // count] for place in range(count)]


def _words(name: str) -> str:
    """A file's name for people: without folder, ending and number."""
    return name.rsplit("/", 1)[-1].removesuffix(".png").removesuffix("-overlay")


def _is_picture(name: str) -> bool:
    return name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))


def _value(order: float | str | None) -> float | None:
    return order if isinstance(order, (int, float)) else None

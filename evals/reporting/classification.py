"""k-NN and zero-shot on the page: accuracy over k, confusions, and misclassified images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from evals.core.report import Report
from radio.data import ImageSource, open_source
from radio.errors import DataError, RadioError
from radio.io import validate

from .blocks import (
    Block,
    Cell,
    Collapsible,
    Column,
    Example,
    Examples,
    Grid,
    Panel,
    Plots,
    Thumbnail,
    notes,
)
from .figures import Series, lines
from .images import ImageBudget
from .records import Classified, Entry, classified, read_records
from .sections import Scored, class_grid

_MOST_PAIRS = 15
_MODELS, _WRONG, _NEIGHBOURS = 4, 6, 5  # shown: models, wrong images of each, neighbours of each image
_THUMB = 56
_MOST_SCENES = 1_000_000


class _Settings(TypedDict, total=False):
    """The settings of k-NN and zero-shot that the page reads."""

    k: list[int]
    primary_k: int | None
    bank: str | None
    query: str | None
    limit: int | None
    scenes: int | list[int] | None
    seed: int
    leave_one_out: bool | None


_SETTINGS = TypeAdapter(_Settings)


class Opened(NamedTuple):
    """A set of images with the index of each key."""

    source: ImageSource
    places: dict[str, int]


def knn_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """Build k-NN's blocks; return them with the names of the tables that they show."""
    blocks: list[Block] = [*_over_k(scored), *_few_shot(scored)]
    return [*blocks, *_samples(scored), *_classes(scored)], frozenset({"classes", "confusions"})


def zeroshot_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """Build zero-shot's blocks; return them with the names of the tables that they show."""
    return [*_samples(scored), *_classes(scored)], frozenset({"classes", "confusions"})


def primary_k(report: Report) -> int | None:
    """Return the k whose metrics have no number in their name; None where the settings do not say."""
    try:
        settings = validate(_SETTINGS, report.settings, "settings")
    except DataError:
        return None
    ks, named = settings.get("k"), settings.get("primary_k")
    if not ks:
        return None
    return named if named is not None else (20 if 20 in ks else ks[0])


def over_k(report: Report, metric: str, color: int) -> Series:
    """Return a metric such as `top1` over k as a series."""
    found = {k: report.metrics[name] for k, name in _numbered(report, f"{metric}_k").items()}
    k = primary_k(report)
    if k is not None and k > 0 and metric in report.metrics:
        found[k] = report.metrics[metric]
    points = sorted(found.items())
    return Series(
        name=report.model,
        color=color,
        x=tuple(float(k) for k, _ in points),
        y=tuple(metric.value for _, metric in points),
        low=tuple(metric.low for _, metric in points),
        high=tuple(metric.high for _, metric in points),
    )


def _numbered(report: Report, prefix: str) -> dict[int, str]:
    """Return the metrics whose name is `prefix` and a number, by that number."""
    pattern = re.compile(re.escape(prefix) + "([1-9][0-9]{0,8})")
    matches = [(pattern.fullmatch(name), name) for name in report.metrics]
    return {int(match[1]): name for match, name in matches if match}


def confusions(records: Sequence[Classified]) -> Counter[tuple[str, str]]:
    """Count how often each class was predicted as another: (class, prediction)."""
    return Counter((r.label, r.predictions[0]) for r in records if r.predictions and not r.right)


def wrong_ones(records: Sequence[Classified], count: int) -> list[Classified]:
    """Select misclassified images, the most confident first, one for each pair of classes."""
    wrong = [record for record in records if record.predictions and not record.right]
    wrong.sort(key=lambda r: (-max((*r.similarities[:1], *r.logits[:1]), default=0.0), r.key))
    found: dict[tuple[str, str], Classified] = {}
    for record in wrong:
        found.setdefault((record.label, record.predictions[0]), record)
    return list(found.values())[:count]


def query_images(reports: Sequence[Report], count: int) -> tuple[list[tuple[str, Tensor]], str]:
    """Select images with their keys, evenly spread over the queries; return them and their source's name.

    They are from the generated world where no report names images that can be read.
    """
    for report in reports:
        if report.task in ("knn", "zeroshot") and not _is_retrieval(report):
            asked, _ = _sources(report, [])
            found = [] if asked is None else _spread(asked.source, count)
            if asked is not None and found:
                return found, asked.source.name
    source = open_source("scenes:val", scenes=1500)
    return _spread(source, count), source.name


def _spread(source: ImageSource, count: int) -> list[tuple[str, Tensor]]:
    count = min(count, len(source.keys))
    places = [number * len(source.keys) // count for number in range(count)]
    try:
        return [(source.keys[place], source.read(place)) for place in places]
    except RadioError:
        return []


def _over_k(scored: Scored) -> list[Block]:
    panels = []
    for metric, title in (("top1", "top-1 (%)"), ("top5", "top-5 (%)")):
        found = [over_k(report, metric, scored.slots[report.model]) for report in scored.reports]
        if max((len(one.x) for one in found), default=0) > 1:
            svg = lines(found, name=f"knn-{metric}", x_label="k", y_label=title, log_x=True)
            panels.append(Panel(title=f"{title} over k", svg=svg))
    caption = "Accuracy over the number of neighbours that vote, with 95 % intervals."
    return [Plots(caption=caption, panels=tuple(panels), legend=scored.legend())] if panels else []


def _few_shot(scored: Scored) -> list[Block]:
    prefix = "top1_few_shot_"
    shots = sorted({shot for report in scored.reports for shot in _numbered(report, prefix)})
    if len(shots) < 2:
        return []
    found = []
    for report in scored.reports:
        values = [report.metrics.get(f"{prefix}{count}") for count in shots]
        there = [(count, metric) for count, metric in zip(shots, values, strict=True) if metric is not None]
        spans = [(m.value - (m.std or 0), m.value + (m.std or 0)) for _, m in there]
        found.append(
            Series(
                name=report.model,
                color=scored.slots[report.model],
                x=tuple(float(count) for count, _ in there),
                y=tuple(metric.value for _, metric in there),
                low=tuple(low for low, _ in spans),
                high=tuple(high for _, high in spans),
            )
        )
    svg = lines(found, name="knn-few-shot", x_label="images a class", y_label="top-1 (%)", log_x=True)
    panel = Panel(title="top-1 over the images a class", svg=svg)
    caption = "Accuracy with few labelled images, ± one standard deviation over tries."
    return [Plots(caption=caption, panels=(panel,), legend=scored.legend())]


def _samples(scored: Scored) -> list[Block]:
    """Build the confusions and the misclassified images from the records."""
    by_model: dict[str, list[Classified]] = {}
    warnings: list[str] = []
    shown: list[Examples] = []
    for entry in scored.entries:
        if _is_retrieval(entry.report):
            continue
        found, remarks = read_records(entry, classified)
        warnings += remarks
        records = [record for group in found.values() for record in group]
        if not records:
            continue
        by_model[entry.report.model] = records
        if len(by_model) <= _MODELS:
            examples, remarks = _wrong_images(entry, records, scored.image_budget)
            warnings += remarks
            shown += [examples] if examples is not None else []
    folded = [Collapsible(summary=one.caption, blocks=(one,)) for one in shown[1:]]
    pairs = _confusion_grid(by_model)
    return [*notes(warnings), *([pairs] if pairs else []), *shown[:1], *folded]


def _is_retrieval(report: Report) -> bool:
    return report.settings.get("captions") is not None


def _confusion_grid(by_model: dict[str, list[Classified]]) -> Grid | None:
    counts = {model: confusions(records) for model, records in by_model.items()}
    if not any(counts.values()):
        return None
    first = next(iter(counts))
    pairs = sorted(counts[first] or next(filter(None, counts.values())).keys())
    pairs.sort(key=lambda pair: -counts[first][pair])
    rows = [
        (
            Cell(text=label),
            Cell(text=taken),
            *(
                Cell(text=str(found[label, taken] or ""), order=found[label, taken])
                for found in counts.values()
            ),
        )
        for label, taken in pairs[:_MOST_PAIRS]
    ]
    return Grid(
        caption=f"The commonest confusions of {first}, and how often each model makes them.",
        columns=(
            Column(name="class", numeric=False),
            Column(name="taken for", numeric=False),
            *(Column(name=model) for model in counts),
        ),
        rows=tuple(rows),
    )


def _classes(scored: Scored) -> list[Block]:
    caption = "Top-1 of each class in percent."
    grid = class_grid(scored.reports, "classes", "top1", caption, count="count")
    return [Collapsible(summary="class by class", blocks=(grid,))] if grid else []


def _wrong_images(
    entry: Entry, records: Sequence[Classified], image_budget: ImageBudget
) -> tuple[Examples | None, list[str]]:
    report, chosen = entry.report, wrong_ones(records, _WRONG)
    if not chosen:
        return None, []
    warnings: list[str] = []
    asked, bank = _sources(report, warnings)
    examples = []
    for record in chosen:
        said = ", ".join(
            f"{name} {value:.1f}" for name, value in zip(record.predictions, record.logits, strict=False)
        )
        image = _thumb(asked, record.key, record.label, None, image_budget, warnings)
        near = [
            _thumb(bank, key, "", record.label, image_budget, warnings, f"{similarity:.2f}")
            for key, similarity in list(zip(record.neighbours, record.similarities, strict=False))[
                :_NEIGHBOURS
            ]
        ]
        examples.append(
            Example(
                image=image,
                lines=(
                    f"{record.label}, taken for {record.predictions[0]}",
                    record.key,
                    *([said] if said else []),
                ),
                others=tuple(one for one in near if one is not None),
                good=False,
            )
        )
    near_words = ", each with its nearest neighbours and their cosine" if chosen[0].neighbours else ""
    caption = f"{report.model}: wrong and sure of it, one image for each pair of classes{near_words}."
    return Examples(caption=caption, examples=tuple(examples)), list(dict.fromkeys(warnings))


def _thumb(
    opened: Opened | None,
    key: str,
    label: str,
    wanted: str | None,
    image_budget: ImageBudget,
    warnings: list[str],
    caption: str = "",
) -> Thumbnail | None:
    if opened is None:
        return None
    place = opened.places.get(key)
    if place is None:
        warnings.append(f"some images, such as {key}, are not in {opened.source.name} any more")
        return None
    name = opened.source.classes[int(opened.source.labels[place])]
    try:
        pixels = opened.source.read(place)
    except RadioError as error:
        warnings.append(f"{key}: {error}")
        return None
    good = None if wanted is None else name == wanted
    alt = f"{key}: {label or name}"
    return image_budget.add(
        pixels, alt, side=96, shown=_THUMB, label=f"{name} {caption}".strip() if caption else "", good=good
    )


def _sources(report: Report, warnings: list[str]) -> tuple[Opened | None, Opened | None]:
    """Open the query images, and those of the bank where the report has one."""
    try:
        settings = validate(_SETTINGS, report.settings, f"settings of {report.model}")
    except DataError as error:
        warnings.append(f"images are not shown: {error}")
        return None, None
    seed, limit, scenes = settings.get("seed", 0), settings.get("limit"), settings.get("scenes", 1500)
    sizes = scenes if isinstance(scenes, list) and len(scenes) == 2 else [scenes, scenes]
    names = [settings.get("bank") or "scenes:train", settings.get("query") or "scenes:val"]
    if settings.get("leave_one_out"):
        names[1], sizes = names[0], [sizes[0], sizes[0]]
    prints = {used.role: used.fingerprint for used in report.data}
    wanted = prints.get("query", prints.get("bank"))
    asked = _open(names[1], sizes[-1], limit, seed, wanted, warnings)
    bank = _open(names[0], sizes[0], limit, seed, prints.get("bank"), warnings) if "bank" in prints else None
    return asked, bank


def _open(
    name: str, scenes: Any, limit: Any, seed: int, fingerprint: str | None, warnings: list[str]
) -> Opened | None:
    """Open the images of a source; None, with a warning, where they are not those that were scored."""
    try:
        count = min(scenes, _MOST_SCENES) if isinstance(scenes, int) else 1500
        source = open_source(name, limit=limit, scenes=count, seed=seed)
        if name.startswith("scenes:") and source.fingerprint != fingerprint:
            raise DataError(f"{name} is not drawn as it was when this was scored")
        return Opened(source, {key: place for place, key in enumerate(source.keys)})
    except (RadioError, OSError) as error:
        warnings.append(f"images are not shown: {error}")
        return None

"""Visual question answering: the benchmarks side by side, and examples of right and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.core.report import Report
from radio.chunks import default_cache
from radio.errors import DataError

from .blocks import Block, Collapsible, Example, Examples, Panel, Plots, Thumbnail, notes
from .figures import bars
from .images import ImageBudget, read_image
from .records import Answered, answered, read_records
from .sections import Scored

_TASKS = ("gqa", "vqav2", "textvqa", "scienceqa", "custom")
_BELOW = ("images", "vqav2/val2014", "scienceqa/images")  # image folders of the generated benchmarks
_EACH = 3  # right answers, and wrong ones, that are shown of a benchmark
_LONGEST = 240  # letters of a question


def vqa_blocks(scored: Scored) -> tuple[list[Block], frozenset[str]]:
    """Build bars of the benchmarks, and examples of answers."""
    blocks: list[Block] = []
    names = [
        name
        for task in _TASKS
        for name in (task, f"blind_{task}")
        if any(name in report.metrics for report in scored.reports)
    ]
    if names:
        svg = bars(
            [f"{name.removeprefix('blind_')}, blind" if "blind_" in name else name for name in names],
            [scored.series(report, names) for report in scored.reports],
            name="vqa-tasks",
            x_label="accuracy (%)",
        )
        caption = "Accuracy on each benchmark; blind: the same questions without the image."
        panels = (Panel(title="accuracy by benchmark", svg=svg),)
        blocks.append(Plots(caption=caption, panels=panels, legend=scored.legend()))
    warnings: list[str] = []
    shown: list[Examples] = []
    for entry in scored.entries:
        found, remarks = read_records(entry, answered)
        folders = image_folders(entry.report)
        warnings += remarks
        for file, records in found.items():
            task = next((task for task in _TASKS if file.endswith(f"-{task}.jsonl")), "questions")
            shown.append(
                Examples(
                    caption=f"{entry.report.model}, {task}: answers right and wrong.",
                    examples=tuple(
                        _example(record, _image(record, folders, scored.image_budget))
                        for record in choose(records)
                    ),
                )
            )
    folded = [Collapsible(summary=one.caption, blocks=(one,)) for one in shown[1:]]
    return [*blocks, *notes(warnings), *shown[:1], *folded], frozenset()


def choose(records: Sequence[Answered]) -> list[Answered]:
    """Select some right and some wrong answers, evenly spread over the records."""
    right = [record for record in records if record.score >= 0.5]
    wrong = [record for record in records if record.score < 0.5]
    return [*_spread(right), *_spread(wrong)]


def _spread(records: Sequence[Answered]) -> list[Answered]:
    count = min(len(records), _EACH)
    return [records[place * len(records) // count] for place in range(count)]


def image_folders(report: Report) -> list[Path]:
    """List the folders that may hold the images of the questions: as the settings say, or in the cache."""
    named = report.settings.get("images")
    if isinstance(named, str):
        return [Path(named)]
    if report.settings.get("questions") is not None:
        return []
    seed, named = report.settings.get("seed", 0), report.settings.get("cache")
    if not isinstance(seed, int) or not (named is None or isinstance(named, str)):
        return []
    roots = sorted((Path(named or default_cache()) / "scenes").glob(f"vqa-benchmarks-*-seed{seed}"))
    return [root / below for root in roots for below in _BELOW]


def _image(record: Answered, folders: Sequence[Path], image_budget: ImageBudget) -> Thumbnail | None:
    """Return the image of a question; None where it cannot be found."""
    for folder in folders if record.image else ():
        try:
            pixels = read_image(folder, record.image)
        except DataError:
            continue
        return image_budget.add(pixels, record.image, side=192, shown=96)
    return None


def _example(record: Answered, image: Thumbnail | None) -> Example:
    question = record.question if len(record.question) <= _LONGEST else f"{record.question[:_LONGEST]}…"
    return Example(
        image=image,
        lines=(
            question,
            f"answered: {record.answer or '(nothing)'}",
            f"expected: {record.expected}, worth {record.score:g}",
            record.image,
        ),
        good=record.score >= 0.5,
    )

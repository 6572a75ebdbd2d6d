"""Visual question answering: the benchmarks side by side, and examples of right and wrong answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from evals.core.report import Report
from radio.errors import RadioError
from radio.scenes import render

from .blocks import Block, Collapsible, Example, Examples, Panel, Plots, Thumbnail, notes
from .figures import bars
from .images import ImageBudget, read_image
from .records import Answered, answered, read_records
from .sections import Scored

_TASKS = ("gqa", "vqav2", "textvqa", "scienceqa", "custom")
# Images of the generated benchmarks; the numbers of the first kind count from 0, of the others from 1.
_GENERATED = re.compile(r"scene(\d{7})\.jpg|(?:COCO_val2014_|test/)(\d{1,12})(?:\.jpg|/image\.png)")
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
        warnings += remarks
        for file, records in found.items():
            task = next((task for task in _TASKS if file.endswith(f"-{task}.jsonl")), "questions")
            shown.append(
                Examples(
                    caption=f"{entry.report.model}, {task}: answers right and wrong.",
                    examples=tuple(
                        _example(record, _image(record, entry.report, scored.image_budget))
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


def _image(record: Answered, report: Report, image_budget: ImageBudget) -> Thumbnail | None:
    """Return the image of a question; None where it cannot be found."""
    settings = report.settings
    folder, seed = settings.get("images"), settings.get("seed", 0)
    generated = _GENERATED.fullmatch(record.image)
    try:
        if isinstance(folder, str):
            pixels = read_image(Path(folder), record.image)
        elif settings.get("questions") is None and generated and isinstance(seed, int):
            first, other = generated.groups()
            index = int(first) if first else int(other) - 1
            pixels = torch.from_numpy(render(index, split="val", seed=seed).image)
        else:
            return None
    except RadioError:
        return None
    return image_budget.add(pixels, record.image, side=192, shown=96)


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

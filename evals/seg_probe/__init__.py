"""The segmentation linear probe: classifies every pixel from frozen tokens, through MMSegmentation."""

from __future__ import annotations

from dataclasses import replace

from evals.core import evaluators
from evals.core.task import Evaluator, RunSettings, late

from .protocol import SegSettings


@evaluators.register("seg")
def make() -> Evaluator[SegSettings]:
    """Segmentation by a linear head on frozen tokens, with MMSegmentation."""
    return Evaluator(
        name="seg",
        settings=SegSettings,
        evaluate=late("evals.seg_probe.evaluator:evaluate"),
        title="segmentation probe",
        with_seed=with_seed,
    )


def with_seed(settings: SegSettings, run: RunSettings, number: int) -> SegSettings:
    """Return the settings of the `number`-th repetition, with other seeds of the heads."""
    first = run.seed if settings.head_seed is None else settings.head_seed
    return replace(settings, head_seed=first + number * settings.seeds)

"""The segmentation linear probe: classifies every pixel from frozen tokens, through MMSegmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evals.core import evaluators
from evals.core.task import OWN, Evaluator, RunSettings, late
from radio.datasets import DataSets

from .protocol import SegSettings


@evaluators.register("seg")
def make() -> Evaluator[SegSettings]:
    """Segmentation by a linear head on frozen tokens, with MMSegmentation."""
    return Evaluator(
        name="seg",
        settings=SegSettings,
        evaluate=late("evals.seg_probe.evaluator:evaluate"),
        title="segmentation probe",
        input_size=late("evals.seg_probe.protocol:crop_size"),
        suffix=lambda settings: "" if settings.voc_split is None else "-voc",
        with_seed=with_seed,
        data_sets=data_sets,
    )


def data_sets(settings: SegSettings, sets: DataSets) -> Mapping[str, SegSettings]:
    """Probe on ADE20K and on VOC2012, unless data are named; a split of VOC's asks for VOC alone."""
    if settings.data is not None:
        return {OWN: settings}
    placed = {}
    if sets.ade20k is not None and settings.voc_split is None:
        placed["ade20k"] = replace(settings, data=sets.ade20k)
    if sets.voc is not None:
        placed["voc"] = replace(settings, data=sets.voc, voc_split=settings.voc_split or "train")
    return placed


def with_seed(settings: SegSettings, run: RunSettings, number: int) -> SegSettings:
    """Return the settings of the `number`-th repetition, with other seeds of the heads."""
    first = run.seed if settings.head_seed is None else settings.head_seed
    return replace(settings, head_seed=first + number * settings.seeds)

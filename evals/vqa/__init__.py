"""Visual question answering: LLaVA-1.5 on any backbone, scored on GQA, VQAv2, TextVQA and ScienceQA."""

from __future__ import annotations

from dataclasses import replace

from evals.core import evaluators
from evals.core.task import Evaluator, RunSettings, late

from .settings import VqaSettings


@evaluators.register("vqa")
def make() -> Evaluator[VqaSettings]:
    """Visual question answering by a LLaVA-1.5 on the model: GQA, VQAv2, TextVQA, ScienceQA."""
    return Evaluator(
        name="vqa",
        settings=VqaSettings,
        evaluate=late("evals.vqa.evaluator:evaluate"),
        title="visual question answering",
        expensive=True,  # it trains a language model
        with_seed=with_seed,
        score_predictions=late("evals.vqa.evaluator:score_predictions"),
        predictions_of=lambda settings: settings.predictions,
    )


def with_seed(settings: VqaSettings, run: RunSettings, number: int) -> VqaSettings:
    """Return the same protocol with other initial weights and another order of samples."""
    seed = run.seed if settings.training_seed is None else settings.training_seed
    return replace(settings, training_seed=seed + number)

"""How much of a teacher's fixed-pattern noise a student has learned: the task's settings."""

from __future__ import annotations

from dataclasses import dataclass

from evals.core import evaluators
from evals.core.task import Evaluator, Scenes, ViewSettings, late


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternSettings(ViewSettings):
    """What a noisy teacher has more than its clean twin, and how much of that a student reproduces."""

    head: str = "dense"
    """The student's adaptor that learned from the noisy teacher, or from its clean twin."""
    noisy: str = "scenes:dense-noisy"
    """The teacher with the pattern, as a spec."""
    clean: str = "scenes:dense"
    """The same teacher without it."""
    query: str | None = None
    """Images that the student was not trained on; labels are not read. Default: the generated world."""
    scenes: Scenes = 300
    """Number of images of the generated world."""


@evaluators.register("pattern")
def make() -> Evaluator[PatternSettings]:
    """Fixed-pattern noise of a teacher that a student reproduces, where the noise is known."""
    return Evaluator(
        name="pattern",
        settings=PatternSettings,
        evaluate=late("evals.fixed_pattern.evaluator:evaluate"),
        title="fixed-pattern noise",
        on_request=True,  # a student of the plain teachers has no noise to learn
        missing_requirements=late("evals.fixed_pattern.evaluator:missing_requirements"),
        input_size=late("evals.core.features:view_size"),
    )

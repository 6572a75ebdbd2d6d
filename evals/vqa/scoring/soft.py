"""VQA accuracy: an answer scores 1 if at least three of the other people gave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .normalise import clean, m4c, official

Rule = Literal["official", "m4c", "llava"]
"""How answers are compared.

- official: normalised only if the ten answers are not all equal, as in VQAv2's evaluation;
- m4c: always normalised, as in TextVQA's scorers;
- llava: `official` on a prediction normalised beforehand, as LLaVA submits them: `Yes.` is then right where
  ten people answered `yes`.
"""

NUM_ANSWERS = 10
_ENOUGH = 3  # people who must agree for a score of 1


def leave_one_out(matches: int, count: int = NUM_ANSWERS) -> float:
    """Compute the mean of min(1, matches in the set / 3) over the sets of all answers but one.

    Of ten answers, 1, 2, 3 and 4 or more matches give 0.3, 0.6, 0.9 and 1.
    """
    assert 0 <= matches <= count
    without = matches * min(_ENOUGH, max(0, matches - 1)) + (count - matches) * min(_ENOUGH, matches)
    return without / (_ENOUGH * count)


def vqa_accuracy(answer: str, truths: Sequence[str], rule: Rule) -> float:
    """Score an answer against people's answers, from 0 to 1."""
    if rule == "m4c":
        said = m4c(answer)
        return leave_one_out(sum(m4c(truth) == said for truth in truths), len(truths))
    said = clean(m4c(answer) if rule == "llava" else answer)
    given = [clean(truth) for truth in truths]
    if len(set(given)) > 1:
        said, given = official(said), [official(truth) for truth in given]
    return leave_one_out(given.count(said), len(given))

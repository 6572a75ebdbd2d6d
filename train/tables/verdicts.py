"""Does the paper's ordering hold? Differences of lines, their intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from evals.core.stats import Values, resampled_sums
from evals.reporting.compare import METRIC_OF

from .results import Score

Verdict: TypeAlias = Literal["holds", "as the paper, within noise", "opposite, within noise", "reversed"]

# Letters: B blocks, A amounts, P parts or classes, R resamples.

_NORMAL = 1.959964  # 97.5 % quantile of the normal distribution
# Those of Student's distribution with 1, 2, ... degrees of freedom.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Difference(NamedTuple):
    """A difference of means over seeds, with a 95 % interval; without one where nothing gives it."""

    value: float
    low: float | None
    high: float | None


def difference(ours: Sequence[Score], theirs: Sequence[Score]) -> Difference:
    """Compare the scores of two models, one per seed each.

    Two errors are independent and are added: that of the seeds, by Welch's interval where each side has
    several or is a frozen model, and that of the images, which both sides share, by a paired bootstrap over
    blocks of them (without blocks: from both sides' own intervals, as if the images were others).

    Args:
        ours: of the line, not empty.
        theirs: of the line that it is compared with, not empty.
    """
    value = _mean(ours) - _mean(theirs)
    image_error = _image_error(ours, theirs)
    if image_error is None:
        return Difference(value, None, None)
    half = math.hypot(_NORMAL * image_error, _seed_half(ours, theirs))
    return Difference(value, value - half, value + half)


def judge(found: Difference, papers: float | None) -> Verdict | None:
    """Judge whether a difference has the sign of the paper's; None where either is unknown or zero."""
    if not papers or found.low is None or found.high is None:
        return None
    agrees = found.value * papers > 0
    if found.low <= 0 <= found.high:
        return "as the paper, within noise" if agrees else "opposite, within noise"
    return "holds" if agrees else "reversed"


def rank_agreement(ours: Sequence[float], papers: Sequence[float]) -> float | None:
    """Compute Kendall's tau-a between two columns; None for fewer than two lines.

    It is the share of pairs in the same order minus that of pairs in the other order; ties count for neither.
    """
    signs = [
        np.sign(ours[i] - ours[j]) * np.sign(papers[i] - papers[j])
        for i in range(len(ours))
        for j in range(i)
    ]
    return float(np.mean(signs)) if signs else None


def _mean(scores: Sequence[Score]) -> float:
    return sum(score.value for score in scores) / len(scores)


def _seed_half(ours: Sequence[Score], theirs: Sequence[Score]) -> float:
    """Compute half of Welch's interval over seeds; 0 where no side has several."""
    parts = [
        (float(np.var([score.value for score in side], ddof=1)) / len(side), len(side) - 1)
        for side in (ours, theirs)
        if len(side) > 1
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    quantile = _STUDENT[int(freedom) - 1] if freedom < len(_STUDENT) + 1 else _NORMAL
    return quantile * math.sqrt(variance)


def _image_error(ours: Sequence[Score], theirs: Sequence[Score]) -> float | None:
    """Compute the standard error of the difference over images."""
    sides = [[_blocks(score) for score in side] for side in (ours, theirs)]
    pairing = ours[0].pairing
    blocks = [each for side in sides for each in side if each is not None]
    alike = len({score.pairing for score in (*ours, *theirs)}) == len({b.shape[:2] for b in blocks}) == 1
    if alike and len(blocks) == len(ours) + len(theirs):
        width = max(each.shape[2] for each in blocks)
        padded = [np.pad(each, ((0, 0), (0, 0), (0, width - each.shape[2]))) for each in blocks]
        resampled = resampled_sums(np.stack(padded, axis=1))  # [R, models, A, P]
        metrics = np.stack([METRIC_OF[pairing](resampled[:, i]) for i in range(len(blocks))])
        gained = metrics[: len(ours)].mean(axis=0) - metrics[len(ours) :].mean(axis=0)
        return float(np.nanstd(gained, ddof=1))
    errors = []
    for side in (ours, theirs):
        widths = [
            score.high - score.low for score in side if score.low is not None and score.high is not None
        ]
        if len(widths) < len(side):
            return None
        errors.append(max(widths) / (2 * _NORMAL))  # as the seeds share their images, their mean has it too
    return math.hypot(*errors)


def _blocks(score: Score) -> Values | None:
    """Return the blocks of a score: [B, A, P]; None where it has none."""
    return np.array(score.blocks, dtype=np.float64) if score.blocks else None

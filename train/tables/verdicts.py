"""Does the paper's ordering hold, or what is claimed? Differences of lines, their intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from evals.core.stats import Values, resampled_sums
from evals.reporting.compare import METRIC_OF

from .layout import Claim
from .results import Score

Verdict: TypeAlias = Literal[
    "holds",
    "as the paper, within noise",
    "as claimed, within noise",
    "opposite, within noise",
    "reversed",
    "tie",
    "higher",
    "lower",
    "no difference seen",
]

# Letters: B blocks, A amounts, P parts or classes, R resamples.

_NORMAL = 1.959964  # 97.5 % quantile of the normal distribution
# Those of Student's distribution with 1, 2, ... degrees of freedom.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Difference(NamedTuple):
    """A difference of means over seeds, with a 95 % interval; without one where nothing gives it."""

    value: float
    low: float | None
    high: float | None


def difference(
    ours: Sequence[Score], theirs: Sequence[Score], *, trained: tuple[bool, bool] = (True, True)
) -> Difference:
    """Compare the scores of two models, one per seed each.

    Two errors are independent and are added: that of the seeds (Welch's interval; of the images alone where
    no trained side has several seeds), and that of the images, which both sides share, by a paired bootstrap
    over blocks of them (without blocks: from both sides' own intervals, as if the images were others).

    Args:
        ours: of the line, not empty.
        theirs: of the line that it is compared with, not empty.
        trained: whether each side is trained, and another seed would give other scores; else it is frozen.
    """
    value = _mean(ours) - _mean(theirs)
    image_half = _image_half(ours, theirs)
    if image_half is None:
        return Difference(value, None, None)
    sides = [side for side, has_seeds in zip((ours, theirs), trained, strict=True) if has_seeds]
    half = math.hypot(image_half, _seed_half(sides))
    return Difference(value, value - half, value + half)


def judge(found: Difference, papers: float | None) -> Verdict | None:
    """Judge whether a difference has the sign of the paper's; None where that is 0 or an interval lacks."""
    if not papers or found.low is None or found.high is None:
        return None
    if found.value == 0:
        return "tie"
    agrees = found.value * papers > 0
    if found.low <= 0 <= found.high:
        return "as the paper, within noise" if agrees else "opposite, within noise"
    return "holds" if agrees else "reversed"


def judge_claim(found: Difference, claim: Claim) -> Verdict | None:
    """Judge whether a difference is as claimed; where nothing is claimed, say what is seen.

    None where an interval lacks.
    """
    if claim:
        verdict = judge(found, 1.0 if claim == "higher" else -1.0)
        return "as claimed, within noise" if verdict == "as the paper, within noise" else verdict
    if found.low is None or found.high is None:
        return None
    if found.low <= 0 <= found.high:
        return "no difference seen"
    return "higher" if found.value > 0 else "lower"


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


def _seed_half(sides: Sequence[Sequence[Score]]) -> float:
    """Compute half of Welch's interval over the seeds of the trained sides; 0 where no side has several.

    A side with one seed is taken to vary as the other does.
    """
    several = [side for side in sides if len(side) > 1]
    variances = [float(np.var([score.value for score in side], ddof=1)) for side in several]
    weights = [1 / len(side) for side in several]
    if len(several) == 1:
        weights[0] += sum(1.0 for side in sides if len(side) == 1)
    parts = [variance * weight for variance, weight in zip(variances, weights, strict=True)]
    if not any(parts):
        return 0.0
    terms = [part**2 / (len(side) - 1) for part, side in zip(parts, several, strict=True)]
    return _student(sum(parts) ** 2 / sum(terms)) * math.sqrt(sum(parts))


def _student(freedom: float) -> float:
    """Compute the 97.5 % quantile of Student's distribution, for the next lower whole number of degrees."""
    whole = int(freedom + 1e-9)
    if whole <= len(_STUDENT):
        return _STUDENT[whole - 1]
    z = _NORMAL  # the first terms of Cornish and Fisher's expansion, right to 0.0021 from 11 on
    return z + (z**3 + z) / (4 * whole) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * whole**2)


def _image_half(ours: Sequence[Score], theirs: Sequence[Score]) -> float | None:
    """Compute half of the interval of the difference over images; None where nothing gives it."""
    pairing = ours[0].pairing
    blocks = [_blocks(score) for score in (*ours, *theirs)]
    known = [each for each in blocks if each is not None]
    same = 3 if pairing == "mean" else 2  # dimensions; a class that no image has is an area of 0
    pairings, shapes = {score.pairing for score in (*ours, *theirs)}, {each.shape[:same] for each in known}
    alike = len(pairings) == len(shapes) == 1
    if alike and len(known) == len(blocks) and len(known[0]) > 1:
        width = max(each.shape[2] for each in known)
        padded = [np.pad(each, ((0, 0), (0, 0), (0, width - each.shape[2]))) for each in known]
        resampled = resampled_sums(np.stack(padded, axis=1))  # [R, models, A, P]
        metrics = np.stack([METRIC_OF[pairing](resampled[:, i]) for i in range(len(known))])
        gained = metrics[: len(ours)].mean(axis=0) - metrics[len(ours) :].mean(axis=0)
        # A bootstrap's variance over B blocks is that of a sample with B and not B - 1 as divisor.
        num_blocks = len(known[0])
        error = float(np.nanstd(gained, ddof=1)) * math.sqrt(num_blocks / (num_blocks - 1))
        return _student(num_blocks - 1) * error
    halves = []
    for side in (ours, theirs):
        widths = [
            score.high - score.low for score in side if score.low is not None and score.high is not None
        ]
        if len(widths) < len(side):
            return None
        halves.append(max(widths) / 2)  # as the seeds share their images, their mean has it too
    return math.hypot(*halves)


def _blocks(score: Score) -> Values | None:
    """Return the blocks of a score: [B, A, P]; None where it has none."""
    return np.array(score.blocks, dtype=np.float64) if score.blocks else None

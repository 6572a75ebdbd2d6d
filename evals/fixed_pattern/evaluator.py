"""Regress what a student's tokens have more than a clean teacher's on what a noisy one has more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from evals.core.evaluator import EvalRun, Result
from evals.core.features import Extraction, StoredFeatures, extract, make_view
from evals.core.report import Metric
from evals.core.stats import interval, resampled_sums
from evals.core.task import ViewSettings
from radio.data import ImageSource
from radio.errors import ConfigError, RadioError
from radio.hub import load_backbone
from radio.types import Backbone, Features, find_adaptor

from . import PatternSettings

# Letters: N images, T tokens, D width of a token, H W grid.


def missing_requirements(model: Backbone) -> str:
    """Explain why the model cannot have learned a pattern; empty if it can."""
    return "" if model.adaptors else f"{model.name} has no adaptors; a distilled student has"


def evaluate(model: Backbone, settings: PatternSettings, run: EvalRun) -> Result:
    """Score how much of the difference of two teachers a student's adaptor reproduces.

    Raises:
        ConfigError: the student has no such adaptor, or the teachers have other grids or widths.
        DataError: data that are absent, or none of them can be read.
        RadioError: the two teachers are alike, or features are not finite.
    """
    adaptor = find_adaptor(model, settings.head)
    clean, noisy = load_backbone(settings.clean), load_backbone(settings.noisy)
    size, patch = clean.native_size, clean.patch_size
    grid = (size[0] // patch, size[1] // patch)
    if (noisy.native_size, noisy.patch_size, noisy.token_dim) != (size, patch, clean.token_dim):
        raise ConfigError(
            f"{settings.noisy} and {settings.clean} have other grids or widths, and one cannot be the "
            f"other's clean twin; give two variants of one teacher"
        )
    source = run.open_images(settings.query or "scenes:val", scenes=settings.scenes)
    run.note_source(source)
    views = ViewSettings(view=settings.view, ratio=settings.ratio)
    teachers = [_tokens(each, source, views, run, "tokens", lambda f: f.tokens) for each in (clean, noisy)]
    head = f"adaptor {settings.head} on {grid[0]}x{grid[1]}"
    student = _tokens(model, source, settings, run, head, lambda f: adaptor(f, grid).tokens)
    if student.features.shape[1:] != teachers[0].features.shape[1:]:
        raise ConfigError(
            f"adaptor {settings.head} of {model.name} has tokens of width {student.features.shape[2]}, and "
            f"{settings.clean} of {clean.token_dim}; give --head the adaptor that learned from it"
        )
    shares = pattern_shares(student.features, *(each.features for each in teachers))
    means = resampled_sums(shares.numpy(), seed=run.settings.seed) / len(shares)
    low, high = interval(100 * means)
    return Result(
        metrics={
            "reproduced": Metric(value=100 * float(shares.mean()), low=low, high=high, higher_is_better=False)
        },
        baselines={"clean twin": 0.0},
        data=[student.info("query", num_classes=0)],
        records=_records(student.keys, shares),
        resolved={"grid": list(grid), "model": settings.noisy, "twin": settings.clean},
    )


def pattern_shares(student: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """Regress student - clean on noisy - clean, image by image: [N, T, D] each -> [N], float64.

    With a pattern that is the same for all images, the mean over the images is the coefficient of one
    regression over all of them: 0 for a student that knows nothing of the pattern, 1 for one that has it all.

    Raises:
        RadioError: an image that both teachers see alike.
    """
    pattern = (noisy.double() - clean.double()).flatten(1)
    size = pattern.square().sum(1)
    if not bool((size > 0).all()):
        raise RadioError("the noisy teacher and its clean twin are alike, so there is no pattern to look for")
    more: Tensor = (student.double() - clean.double()).flatten(1)
    return (more * pattern).sum(1) / size


def _tokens(
    model: Backbone,
    source: ImageSource,
    view: ViewSettings,
    run: EvalRun,
    head: str,
    project: Callable[[Features], Tensor],
) -> StoredFeatures:
    """Extract tokens [N, T, D] of all images, or read them from the cache."""
    made, notes = make_view(model, view)
    run.notes += [note for note in notes if note not in run.notes]
    how = Extraction(
        view=made,
        device=run.device,
        dtype=run.dtype,
        head=head,
        project=project,
        batch=run.batch_size(64),
        workers=run.workers,
    )
    return extract(
        model,
        source,
        how,
        cache=run.cache,
        group=run.ranks,
        watch=run.progress,
        damage=run.damage,
    )


def _records(keys: Sequence[str], shares: Tensor) -> Iterator[dict[str, Any]]:
    """Yield each image's share, which may be below 0 or above 1 and hence is no `score`."""
    for key, share in zip(keys, shares.tolist(), strict=True):
        yield {"id": key, "share": round(share, 6)}

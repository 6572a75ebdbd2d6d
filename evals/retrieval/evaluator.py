"""Instance retrieval: which images of a database show the object of a query, by the cosine of summaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evals.core.blocks import Block, Example, Examples, Table
from evals.core.classification import source_image
from evals.core.evaluator import EvalRun, Result
from evals.core.features import StoredFeatures
from evals.core.report import Metric
from evals.core.stats import interval, resampled_sums
from radio.errors import DataError
from radio.types import Backbone

from . import RetrievalSettings
from .data import Benchmark, make_scenes, open_landmarks
from .scores import Scores, chance, rank, score_ranking

# Letters: Q queries, N images of the database.

_KS = (1, 5, 10)
_KEPT = 10  # images of a ranking that stand in its record
_CELLS = 1 << 22  # of rankings in memory at once
_WORST, _SHOWN = 6, 5  # queries on the page, and images beside each


class Ranked(NamedTuple):
    """The scores of all queries, and the images that come first."""

    scores: dict[str, Scores]  # by the protocol's suffix
    first: Tensor  # [Q, k] rows of the database, the nearest first, without junk; -1 is no image
    good: Tensor  # [Q, k] whether the primary protocol counts them as positive
    baselines: dict[str, float]  # mean average precision in percent of an order by class, and of a random one


def evaluate(model: Backbone, settings: RetrievalSettings, run: EvalRun) -> Result:
    """Score a model by the mean average precision of its rankings.

    Raises:
        DataError: data that are absent or contradict themselves, or no query has a positive.
        SizeError: a size below one pixel, or too many pixels.
    """
    benchmark = _open(settings, run)
    database = run.features(model, benchmark.database, settings)
    queries = run.features(model, benchmark.queries, settings)
    ranked = _rank_all(benchmark, queries, database)
    primary, scores = next(iter(ranked.scores.items()))
    metrics: dict[str, Metric] = {}
    for suffix, each in ranked.scores.items():
        means = {"map": each.ap, **{f"mp{k}": values for k, values in each.precision.items()}}
        metrics |= {
            f"{name}{suffix}": _mean(values, run)
            for name, values in means.items()
            if not bool(values.isnan().all())
        }
    if f"map{primary}" not in metrics:
        raise DataError(f"{benchmark.queries.name}: no query has a positive that can be read")
    left_out = int(scores.ap.isnan().sum())
    return Result(
        metrics=metrics,
        baselines=ranked.baselines,
        data=[database.info("database", num_classes=0), queries.info("query", num_classes=0)],
        records=_records(queries, database, ranked, scores),
        blocks=[*_table(ranked.scores, metrics), _worst(run, queries, database, ranked, scores)],
        notes=[f"queries left out since they have no positive: {left_out}"] if left_out else [],
        resolved={"width": queries.features.shape[1]},
    )


def _open(settings: RetrievalSettings, run: EvalRun) -> Benchmark:
    limit, seed = run.settings.limit, run.settings.seed
    if limit == 0:
        raise DataError("--limit 0 leaves no queries; give 1 or more, or leave it out")
    if settings.data is None:
        return make_scenes(*settings.scenes, seed=seed, limit=limit)
    return open_landmarks(settings.data, limit=limit, memo=run.fingerprints, watch=run.progress)


def _rank_all(benchmark: Benchmark, queries: StoredFeatures, database: StoredFeatures) -> Ranked:
    """Rank the database for every query, some queries at a time, and score the rankings."""
    images = database.indices()
    size = max(1, _CELLS // len(images))
    labels, own = queries.labels, database.labels
    primary = next(iter(benchmark.protocols))
    parts: dict[str, list[Scores]] = {suffix: [] for suffix in benchmark.protocols}
    first, good, levels = [], [], []
    for rows in torch.arange(len(queries.features)).split(size):
        ranking = rank(queries.features[rows], database.features)
        grades = benchmark.grades(queries.indices()[rows])[:, images]
        for suffix, protocol in benchmark.protocols.items():
            positive, junk = (torch.isin(grades, torch.tensor(g, dtype=torch.uint8)) for g in protocol)
            parts[suffix].append(score_ranking(ranking, positive, junk, _KS))
            if suffix == primary:
                left_out = junk.gather(1, ranking)
                kept = left_out.long().argsort(dim=1, stable=True)[:, :_KEPT]
                nearest = ranking.gather(1, kept)
                first.append(nearest.masked_fill(left_out.gather(1, kept), -1))
                good.append(positive.gather(1, nearest))
                alike = (labels[rows].unsqueeze(1) == own) & ~junk
                counts = torch.stack([(~junk).sum(1), alike.sum(1), positive.sum(1)], dim=1).tolist()
                levels += [(chance(n, m), chance(of_class, m)) for n, of_class, m in counts if m]
    scores = {
        suffix: Scores(
            torch.cat([part.ap for part in each]),
            {k: torch.cat([part.precision[k] for part in each]) for k in _KS},
        )
        for suffix, each in parts.items()
    }
    baselines = {"class known": [level for _, level in levels]} if len(queries.source.classes) > 1 else {}
    baselines["chance"] = [level for level, _ in levels]  # the page shows the first
    means = {name: 100 * sum(each) / max(len(each), 1) for name, each in baselines.items()}
    return Ranked(scores, torch.cat(first), torch.cat(good), means)


def _mean(values: Tensor, run: EvalRun) -> Metric:
    """Compute the mean over the queries that have positives, in percent, with a bootstrap over them."""
    present = 100 * values[~values.isnan()]
    means = resampled_sums(present.numpy()[:, None], seed=run.settings.seed)[:, 0] / len(present)
    low, high = interval(means)
    return Metric(value=float(present.mean()), low=low, high=high)


def _records(
    queries: StoredFeatures, database: StoredFeatures, ranked: Ranked, scores: Scores
) -> Iterator[dict[str, Any]]:
    """Yield each query's average precision in the primary protocol, and the images that came first."""
    for row, key in enumerate(queries.keys):
        if not bool(scores.ap[row].isnan()):
            images = [database.keys[image] for image in ranked.first[row].tolist() if image >= 0]
            yield {"id": key, "score": float(scores.ap[row]), "images": images}


def _table(scores: Mapping[str, Scores], metrics: Mapping[str, Metric]) -> list[Block]:
    """Tabulate the protocols, where there are several."""
    if len(scores) == 1:
        return []
    columns = ("map", *(f"mp{k}" for k in _KS))
    rows = tuple(
        (
            suffix.removeprefix("_"),
            *(
                metrics[name].value if (name := f"{column}{suffix}") in metrics else None
                for column in columns
            ),
        )
        for suffix in scores
    )
    return [Table(title="each protocol (%)", columns=("protocol", *columns), rows=rows, compared="map")]


def _worst(
    run: EvalRun, queries: StoredFeatures, database: StoredFeatures, ranked: Ranked, scores: Scores
) -> Examples:
    """Show the queries of the least average precision with the images that came first."""
    examples = []
    order = scores.ap.nan_to_num(nan=2.0).argsort(stable=True)[:_WORST]
    for row in order[~scores.ap[order].isnan()].tolist():
        index, precision = int(queries.indices()[row]), float(scores.ap[row])
        shown = []
        for image, good in zip(ranked.first[row, :_SHOWN].tolist(), ranked.good[row].tolist(), strict=False):
            if image < 0:
                break
            place, word = int(database.indices()[image]), "the same object" if good else "another object"
            shown.append(source_image(run, database.source, place, word, good=good))
        examples.append(
            Example(
                image=source_image(run, queries.source, index, "query"),
                lines=(queries.keys[row], f"average precision {100 * precision:.1f} %"),
                others=tuple(image for image in shown if image is not None),
                good=False,
            )
        )
    return Examples(
        title="the queries of the least average precision, and the images that came first",
        examples=tuple(examples),
    )

"""k-NN classification of frozen summaries, without training anything (Z. Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from evals.core.blocks import Block, Lines
from evals.core.classification import (
    class_table,
    confusions,
    mean_class,
    source_image,
    top_accuracies,
    wrong_examples,
)
from evals.core.evaluator import EvalRun, Evaluator, Result
from evals.core.features import Scenes, StoredFeatures, ViewSettings, check_head, to_teacher_space
from evals.core.report import Metric
from radio.config import Count, Positive
from radio.data import ImageSource, aligned_labels
from radio.errors import ConfigError, DataError
from radio.types import Backbone

from .index import Index, Neighbours, count_votes, load_faiss
from .real_labels import read_accepted, real_accuracy

# Letters: N bank, Q queries, C summary width, k neighbours.

Neighbourhood = Annotated[int, Interval(ge=1, le=16_384)]
"""Number of neighbours that vote; those of a query are in memory at once."""

_SHOWN_NEIGHBOURS = 5  # of a misclassified image


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnSettings(ViewSettings):
    """Weighted k-nearest-neighbour classification of frozen summaries."""

    bank: str | None = None
    """Labelled images that provide the neighbours: a folder with one folder per class, or tar shards.
    Default: the generated world."""
    query: str | None = None
    """Labelled images to classify. Default: the generated world."""
    leave_one_out: bool = False
    """Classify the bank's own images, each without itself, instead of a query set."""
    scenes: tuple[Scenes, Scenes] = (6000, 1500)
    """Numbers of bank and query images of the generated world."""
    k: tuple[Neighbourhood, ...] = (10, 20, 100, 200)
    """Numbers of neighbours, scored from one search."""
    primary_k: Neighbourhood | None = None
    """The k whose scores are called top1, top5 and mean_class. Default: 20 if it is among k, else the
    first."""
    temperature: Positive = 0.07
    """A neighbour of similarity s votes exp(s / temperature)."""
    few_shot: tuple[Count, ...] = ()
    """Also score banks with these numbers of images per class."""
    tries: Annotated[int, Interval(ge=0, le=1000)] = 5
    """Random banks for each few-shot count; the seeds count from 0."""
    head: str | None = None
    """Score the summary in this teacher's space, through the student's adaptor."""
    real_labels: Path | None = None
    """Also score against a JSON list of accepted classes per query image (ImageNet-ReaL's layout)."""

    def __post_init__(self) -> None:
        """Validate the settings; raise `ConfigError` when they are invalid or contradictory."""
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k = {self.k}: give one or more numbers of neighbours, each 1 or more")
        if self.primary_k is not None and self.primary_k not in self.k:
            raise ConfigError(f"primary_k = {self.primary_k} is not among k = {self.k}; add it there")
        if self.few_shot and (min(self.few_shot) < 1 or self.tries < 1):
            raise ConfigError(
                f"few_shot = {self.few_shot} with {self.tries} tries: give numbers of 1 or more"
            )
        if self.leave_one_out and self.query is not None:
            raise ConfigError("leave_one_out classifies the bank itself; leave the query out")
        if self.bank is None and self.query is not None:
            raise ConfigError("a query without a bank has no neighbours; give --bank too")
        if self.bank is not None and self.query is None and not self.leave_one_out:
            raise ConfigError("a bank without a query: give --query, or --leave-one-out")
        ViewSettings.__post_init__(self)  # super() does not work in a class with slots

    @property
    def main_k(self) -> int:
        """The k whose metrics have no suffix."""
        if self.primary_k is not None:
            return self.primary_k
        return 20 if 20 in self.k else self.k[0]


class _Bank(NamedTuple):
    """The labelled neighbours: this rank's share of the summaries, and all labels."""

    features: Tensor  # [n, C] of this rank
    ids: Tensor  # [n], indices into the bank's source
    all_ids: Tensor  # [N] of the readable images of all ranks
    labels: Tensor  # by index into the source, unreadable images included


def evaluate(model: Backbone, settings: KnnSettings, run: EvalRun) -> Result:
    """Score a model by the votes of the nearest neighbours of each query.

    Raises:
        DataError: data that are absent, empty, of one class only, or whose classes do not agree.
        ConfigError: an unknown device, or a head that the model does not have.
        SizeError: a size below one pixel, or too many pixels.
        MissingExtraError: FAISS is not installed.
    """
    load_faiss()  # raises here rather than after the extraction
    bank_source, query_source = _open(settings, run)
    classes = bank_source.classes
    accepted = None
    if settings.real_labels is not None:
        accepted = read_accepted(settings.real_labels, query_source.keys, classes)
    check_head(model, settings.head)
    stored = run.features(model, bank_source, settings)
    stored_queries = stored if settings.leave_one_out else run.features(model, query_source, settings)

    shard = stored.load(run.ranks.rank, run.ranks.world)
    bank = _Bank(
        to_teacher_space(model, settings.head, shard.features),
        shard.indices,
        stored.indices(),
        torch.from_numpy(bank_source.labels),
    )
    queries = to_teacher_space(model, settings.head, stored_queries.features)
    query_ids = stored_queries.indices()
    labels = torch.from_numpy(aligned_labels(query_source, bank_source))[query_ids]
    exclude = query_ids if settings.leave_one_out else None

    def search(features: Tensor, ids: Tensor, k: int) -> Neighbours:
        most = min(k, max(len(bank.all_ids), 1))  # more do not exist and would take memory
        return Index(features, ids, run.device).search(queries, most, exclude=exclude, group=run.ranks)

    def classify(neighbours: Neighbours, ks: Sequence[int]) -> dict[int, Tensor]:
        return count_votes(
            neighbours, bank.labels, ks, num_classes=len(classes), temperature=settings.temperature
        )

    k = settings.main_k
    neighbours = search(bank.features, bank.ids, max(settings.k))
    rankings = classify(neighbours, settings.k)
    neighbours = Neighbours(neighbours.similarities[:, :k], neighbours.ids[:, :k])
    ranking = rankings[k]
    metrics = accuracies(rankings, labels, len(classes), k)
    for per_class in settings.few_shot:
        tops = []
        for seed in range(settings.tries):
            chosen = choose(bank.all_ids, bank.labels[bank.all_ids], per_class, seed)
            local = torch.isin(bank.ids, chosen)
            tops.append(classify(search(bank.features[local], bank.ids[local], k), (k,))[k][:, 0])
        shares = [100 * float((top == labels).double().mean()) for top in tops]
        metrics[f"top1_few_shot_{per_class}"] = mean_of_tries(shares)
    if accepted is not None:
        metrics["top1_real"] = real_accuracy(ranking, [accepted[i] for i in query_ids.tolist()])

    available = len(bank.all_ids) - settings.leave_one_out
    data = [stored.info("bank", scored=settings.leave_one_out)]
    return Result(
        metrics=metrics,
        baselines={"chance": 100 / len(classes)},
        data=data if settings.leave_one_out else [*data, stored_queries.info("query")],
        records=_records(stored_queries, labels, neighbours, ranking, bank_source),
        blocks=[
            *_curves(metrics, settings),
            confusions(ranking, labels, classes),
            *_wrong_images(run, stored_queries, labels, neighbours, ranking, bank_source),
            class_table(ranking, labels, classes),
        ],
        resolved={
            "features": "summary" if settings.head is None else f"adaptor {settings.head}",
            "width": queries.shape[1],
        },
        notes=[
            f"k = {k} is more than the {available} images of the bank; all of them voted"
            for k in sorted(set(settings.k))
            if k > available
        ],
    )


def accuracies(
    rankings: Mapping[int, Tensor], labels: Tensor, num_classes: int, main_k: int
) -> dict[str, Metric]:
    """Compute top-1 and top-5 for each k, and the mean over classes for the main k, in percent.

    top-5 is omitted below five classes; a class without a vote is no prediction.
    """
    metrics: dict[str, Metric] = {}
    for k in sorted(rankings, key=lambda k: (k != main_k, k)):
        metrics |= top_accuracies(rankings[k], labels, num_classes, "" if k == main_k else f"_k{k}")
    metrics["mean_class"] = mean_class(rankings[main_k], labels)
    return metrics


def mean_of_tries(values: Sequence[float]) -> Metric:
    """Compute the mean of several tries, and the standard deviation (n - 1) of two or more."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return Metric(value=float(tensor.mean()), std=float(tensor.std()) if len(values) > 1 else None)


def choose(ids: Tensor, labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Sample `per_class` ids of each class (all of a smaller one), ascending."""
    generator = np.random.default_rng(seed)
    chosen = []
    for label in labels.unique().tolist():
        members = ids[labels == label].numpy()
        chosen.append(generator.permutation(members)[:per_class])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _open(settings: KnnSettings, run: EvalRun) -> tuple[ImageSource, ImageSource]:
    bank = run.open_images(settings.bank or "scenes:train", scenes=settings.scenes[0])
    if len(np.unique(bank.labels)) < 2:
        raise DataError(
            f"{bank.name}: holds one class only, so every vote is right; give two classes or more"
        )
    if settings.leave_one_out:
        return bank, bank
    query = run.open_images(settings.query or "scenes:val", scenes=settings.scenes[1])
    aligned_labels(query, bank)  # raises here rather than after the extraction
    return bank, query


def _records(
    queries: StoredFeatures, labels: Tensor, neighbours: Neighbours, ranking: Tensor, bank: ImageSource
) -> Iterator[dict[str, Any]]:
    """Yield a record per query: its label, its predictions, and the neighbours that voted, nearest first."""
    for row, key in enumerate(queries.keys):
        ids = [index for index in neighbours.ids[row].tolist() if index >= 0]
        yield {
            "id": key,
            "score": int(ranking[row, 0] == labels[row]),
            "label": bank.classes[int(labels[row])],
            "predictions": [bank.classes[label] for label in ranking[row].tolist() if label >= 0],
            "neighbour_ids": ids,
            "neighbours": [bank.keys[index] for index in ids],
            "similarities": [round(s, 6) for s in neighbours.similarities[row, : len(ids)].tolist()],
        }


def _curves(metrics: Mapping[str, Metric], settings: KnnSettings) -> Iterator[Block]:
    """Yield accuracy over k, and over the images per class."""
    ks = sorted(set(settings.k))
    for name, label in (("top1", "top-1 (%)"), ("top5", "top-5 (%)")):
        if name in metrics and len(ks) > 1:
            points = [metrics[name if k == settings.main_k else f"{name}_k{k}"] for k in ks]
            yield Lines(
                title=f"{label} over k",
                x_label="k",
                y_label=label,
                x=tuple(map(float, ks)),
                y=tuple(metric.value for metric in points),
                low=tuple(metric.low for metric in points),
                high=tuple(metric.high for metric in points),
                log_x=True,
                caption="Accuracy over the number of neighbours that vote, with 95 % intervals.",
            )
    counts = sorted(set(settings.few_shot))
    if len(counts) > 1:
        points = [metrics[f"top1_few_shot_{count}"] for count in counts]
        yield Lines(
            title="top-1 over the images a class",
            x_label="images a class",
            y_label="top-1 (%)",
            x=tuple(map(float, counts)),
            y=tuple(metric.value for metric in points),
            low=tuple(metric.value - (metric.std or 0) for metric in points),
            high=tuple(metric.value + (metric.std or 0) for metric in points),
            log_x=True,
            caption="Accuracy with few labelled images, ± one standard deviation over tries.",
        )


def _wrong_images(
    run: EvalRun,
    queries: StoredFeatures,
    labels: Tensor,
    neighbours: Neighbours,
    ranking: Tensor,
    bank: ImageSource,
) -> list[Any]:
    """Show misclassified queries with their nearest neighbours."""
    bank_labels = bank.labels

    def nearest(row: int) -> tuple[Any, ...]:
        shown = []
        for rank, index in enumerate(neighbours.ids[row, :_SHOWN_NEIGHBOURS].tolist()):
            if index >= 0:
                name = bank.classes[int(bank_labels[index])]
                label = f"{name} {float(neighbours.similarities[row, rank]):.2f}"
                good = int(bank_labels[index]) == int(labels[row])
                shown.append(source_image(run, bank, index, name, label=label, good=good))
        return tuple(image for image in shown if image is not None)

    return wrong_examples(
        run,
        queries.source,
        queries.indices(),
        ranking,
        labels,
        neighbours.similarities[:, 0],
        bank.classes,
        title="wrong and sure of it, one image for each pair of classes, with its nearest neighbours and "
        "their cosine",
        others=nearest,
    )


KNN = Evaluator(
    name="knn",
    settings=KnnSettings,
    evaluate=evaluate,
    title="k-NN",
    suffix=lambda settings: f"-{settings.head}-head" if settings.head else "",
)

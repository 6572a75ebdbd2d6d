"""Predictions from features: search, vote, and the same with few-shot banks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from evals.core.features import Bank, Stored
from evals.core.report import Metric
from radio.data import ImageSource, aligned_labels
from radio.dist import Group

from .index import Index, Neighbours
from .scoring import repeated
from .settings import KnnSettings
from .vote import vote

# Letters: N bank, Q queries, C classes, k neighbours.

_VOTES = 4096  # queries whose votes are counted at once


class Sets(NamedTuple):
    """Bank and query sets; `query` is None when the bank's own images are classified."""

    bank: ImageSource
    query: ImageSource | None

    @property
    def asked(self) -> ImageSource:
        """The source of the queries."""
        return self.bank if self.query is None else self.query


@final
@dataclass(frozen=True, slots=True)
class Classifier:
    """One rank's share of the bank, and all queries."""

    settings: KnnSettings
    group: Group
    num_classes: int
    bank_labels: Tensor  # [N] by index in the bank's source, unreadable images included
    bank_indices: Tensor  # indices of the bank's readable images
    shard: Bank  # this rank's share of the bank
    queries: Bank
    labels: Tensor  # [Q]
    exclude: Tensor | None  # [Q] id that must not be a query's neighbour
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))  # of the search

    @property
    def available(self) -> int:
        """Number of neighbours that a query can have."""
        return len(self.bank_indices) - (self.exclude is not None)

    def classify(self) -> tuple[Neighbours, dict[int, Tensor]]:
        """Return the neighbours for the primary k, and the five classes with most votes [Q, 5] for each k."""
        found = self._search(self.shard.features, self.shard.indices, max(self.settings.k))
        k = self.settings.primary_metric
        return Neighbours(found.similarities[:, :k], found.ids[:, :k]), self._vote(found, self.settings.k)

    def few_shot(self, per_class: int) -> Metric:
        """Compute top-1 with `per_class` images per class in the bank: mean and std over the tries."""
        k = self.settings.primary_metric
        values = []
        for attempt in range(self.settings.tries):
            chosen = choose(self.bank_indices, self.bank_labels[self.bank_indices], per_class, attempt)
            mine = torch.isin(self.shard.indices, chosen)
            found = self._search(self.shard.features[mine], self.shard.indices[mine], k)
            top = self._vote(found, (k,))[k][:, 0]
            values.append(100 * float((top == self.labels).double().mean()))
        return repeated(values)

    def _search(self, features: Tensor, ids: Tensor, k: int) -> Neighbours:
        most = min(k, max(len(self.bank_indices), 1))  # more do not exist and would take memory
        index = Index(features, ids, self.device)
        return index.search(self.queries.features, most, exclude=self.exclude, group=self.group)

    def _vote(self, found: Neighbours, ks: tuple[int, ...]) -> dict[int, Tensor]:
        temperature = self.settings.temperature
        return count_votes(found, self.bank_labels, ks, num_classes=self.num_classes, temperature=temperature)


def count_votes(
    found: Neighbours, bank_labels: Tensor, ks: Sequence[int], *, num_classes: int, temperature: float
) -> dict[int, Tensor]:
    """Return for each k the five classes with most votes [Q, 5]; the neighbours' ids index the labels."""
    labels = bank_labels[found.ids.clamp(min=0)].masked_fill(found.ids < 0, -1)
    blocks = zip(found.similarities.split(_VOTES), labels.split(_VOTES), strict=True)
    parts = [vote(*block, ks, num_classes=num_classes, temperature=temperature) for block in blocks]
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def make_classifier(
    sets: Sets,
    stored: Stored,
    asked: Stored,
    settings: KnnSettings,
    group: Group,
    to_teacher_space: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Classifier:
    """Create the classifier of extracted features: every rank holds its chunks of the bank and all queries.

    `to_teacher_space` maps summaries [N, C] into the space in which they are compared.
    """
    queries, shard = asked.load(), stored.load(group.rank, group.world)
    return Classifier(
        settings=settings,
        group=group,
        num_classes=len(sets.bank.classes),
        bank_labels=torch.from_numpy(sets.bank.labels),
        bank_indices=stored.indices(),
        shard=shard._replace(features=to_teacher_space(shard.features)),
        queries=queries._replace(features=to_teacher_space(queries.features)),
        labels=torch.from_numpy(aligned_labels(sets.asked, sets.bank))[queries.indices],
        exclude=queries.indices if sets.query is None else None,
        device=device,
    )


def choose(indices: Tensor, labels: Tensor, per_class: int, attempt: int) -> Tensor:
    """Draw `per_class` indices of each class (all of a smaller one), ascending, with seed `attempt`."""
    generator = np.random.default_rng(attempt)
    chosen = []
    for label in labels.unique().tolist():
        members = indices[labels == label].numpy()
        chosen.append(generator.permutation(members)[:per_class])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))

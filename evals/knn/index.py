"""Exact cosine neighbours with FAISS, independent of the number of ranks, and their votes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from evals.core.features import to_unit
from radio.dist import Ranks
from radio.errors import DataError, require

# Letters: N bank, Q queries, C feature width, k neighbours, M merged candidates.

_NOISE = 2e-6  # float32 products of unit vectors of width 1280 have errors of at most about 3e-7
_DECIMALS = 10  # of float64 similarities: far above their rounding, far below the noise
_SPARE = 8  # candidates beyond k, so that ties at the border are detected
_QUERIES = 4096  # in one search
_ROWS = 8192  # of the bank at once in float64
_LEAST_ROWS = 12_288  # of the bank in one search of FAISS; each starts its candidates anew
_PARTS = 8  # of a large bank: one of them is in memory as unit vectors too
_PAIRS = 1024  # compared again at once
_EXACT = 128  # queries in one search in float64
_MOST_ON_GPU = 2048  # neighbours that FAISS supports on a GPU
_CPU = torch.device("cpu")
_BLOCK = (1024, 8192)  # queries and bank in one product of FAISS: fewer thread waits than by default
_KERNELS = {"AVX512": "SkylakeX", "AVX2": "Haswell"}  # torch's name of the CPU capability -> OpenBLAS's


class Neighbours(NamedTuple):
    """Neighbours of each query, the nearest first, padded by -inf and -1 up to k."""

    similarities: Tensor  # [Q, k] float32, cosine
    ids: Tensor  # [Q, k] int64


@final
class Index:
    """The bank, or one rank's share of it.

    Args:
        features: [N, C] float32, of any length; not copied, as a search normalises them block by block.
        ids: [N] int64, ascending, unique over all ranks.
        device: where candidates are searched; a GPU is used if this FAISS supports it.

    Raises:
        MissingExtraError: FAISS is not installed.
    """

    def __init__(self, features: Tensor, ids: Tensor, device: torch.device = _CPU) -> None:
        self._faiss = load_faiss()
        self._vectors, self._ids = features, ids.contiguous()
        self._on_gpu = _copy_to_gpu(self._faiss, features, device)

    def search(
        self, queries: Tensor, k: int, *, exclude: Tensor | None = None, group: Ranks | None = None
    ) -> Neighbours:
        """Find the k nearest vectors of all ranks to each query; every rank passes the same arguments.

        Args:
            queries: [Q, C] float32, of any length.
            exclude: [Q] ids that must not be a query's neighbour (itself, when it is in the bank).

        Raises:
            DataError: k below 1, or queries of another width than the bank.
        """
        if k < 1:
            raise DataError(f"k = {k} asks for no neighbours; give 1 or more")
        if len(self._ids) and queries.shape[1] != self._vectors.shape[1]:
            raise DataError(
                f"queries of width {queries.shape[1]} do not fit a bank of {self._vectors.shape[1]}"
            )
        group = group or Ranks()
        parts = [
            self._search(to_unit(block), k, banned, group)
            for block, banned in zip(
                queries.split(_QUERIES),
                (torch.full((len(queries),), -1) if exclude is None else exclude).split(_QUERIES),
                strict=True,
            )
        ]
        return Neighbours(torch.cat([n.similarities for n in parts]), torch.cat([n.ids for n in parts]))

    def _search(self, queries: Tensor, k: int, exclude: Tensor, group: Ranks) -> Neighbours:
        width = k + 1 + _SPARE
        similarities, ids, border = self._candidates(queries, width, exclude)
        similarities, ids = _merge(group.gather(similarities), group.gather(ids))
        border = group.gather(border).amax(0)
        if similarities.shape[1] > width:
            border = torch.maximum(border, similarities[:, width])
        similarities, ids = similarities[:, :width], ids[:, :width]
        similarities, ids = self._settle_ties(queries, similarities, ids, group)
        kth = similarities[:, k - 1]
        open_ended = (kth - border < _NOISE) & kth.isfinite() & border.isfinite()
        similarities, ids = similarities[:, :k], ids[:, :k]
        rows = open_ended.nonzero().squeeze(1)  # the same on every rank
        if len(rows):
            similarities[rows], ids[rows] = self._search_exactly(queries[rows], k, exclude[rows], group)
        return Neighbours(similarities.float(), ids)

    def _candidates(self, queries: Tensor, width: int, exclude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's candidates, similarities (float64) and ids [Q, width], and the border [Q].

        The border is the similarity below which the rank may have further candidates.
        """
        similarities = torch.full((len(queries), width), -torch.inf, dtype=torch.float64)
        ids = torch.full((len(queries), width), -1, dtype=torch.int64)
        border = torch.full((len(queries),), -torch.inf, dtype=torch.float64)
        fetch = min(width, len(self._ids))
        if fetch == 0:
            return similarities, ids, border
        if self._on_gpu is not None and fetch <= _MOST_ON_GPU:
            values, rows = map(torch.from_numpy, self._on_gpu.search(queries.numpy(), fetch))
        else:
            values, rows = self._search_blocks(queries, fetch)
        similarities[:, :fetch], ids[:, :fetch] = values.double(), self._ids[rows]
        if fetch < len(self._ids):
            border = similarities[:, fetch - 1].clone()
        banned = ids == exclude.unsqueeze(1)
        return similarities.masked_fill_(banned, -torch.inf), ids.masked_fill_(banned, -1), border

    def _search_blocks(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k highest cosines [Q, k] float32 and their rows, block by block."""
        values, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        size = max(_LEAST_ROWS, -(-len(self._vectors) // _PARTS))
        product = self._faiss.METRIC_INNER_PRODUCT
        for start in range(0, len(self._vectors), size):
            part = self._vectors[start : start + size]
            found = self._faiss.knn(queries.numpy(), to_unit(part).numpy(), min(k, len(part)), product)
            values = torch.cat([values, torch.from_numpy(found[0])], dim=1)
            rows = torch.cat([rows, torch.from_numpy(found[1]) + start], dim=1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, order)
        return values, rows

    def _settle_ties(
        self, queries: Tensor, similarities: Tensor, ids: Tensor, group: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Reorder the candidates [Q, M], comparing those within the noise of each other in float64."""
        near = (similarities[:, :-1] - similarities[:, 1:] < _NOISE) & similarities[:, 1:].isfinite()
        tied = F.pad(near, (0, 1)) | F.pad(near, (1, 0))
        query, place = tied.nonzero(as_tuple=True)
        if len(query) == 0:
            return similarities, ids
        exact = group.sum(self._compare(queries, query, ids[query, place]))
        similarities = similarities.index_put((query, place), exact.round(decimals=_DECIMALS))
        return _sort(similarities, ids)

    def _compare(self, queries: Tensor, query: Tensor, ids: Tensor) -> Tensor:
        """Compute the float64 similarities [P] of pairs (query, id); 0 where another rank holds the id."""
        exact = torch.zeros(len(query), dtype=torch.float64)
        if len(self._ids) == 0:
            return exact
        rows = torch.searchsorted(self._ids, ids).clamp_(max=len(self._ids) - 1)
        mine = (self._ids[rows] == ids).nonzero().squeeze(1)
        for part in mine.split(_PAIRS):
            pairs = queries[query[part]].double() * to_unit(self._vectors[rows[part]]).double()
            exact[part] = pairs.sum(1)
        return exact

    def _search_exactly(
        self, queries: Tensor, k: int, exclude: Tensor, group: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Search [R, k] in float64 throughout, for queries with more ties at the border than were fetched."""
        similarities = torch.full((len(queries), k), -torch.inf, dtype=torch.float64)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64)
        for part in torch.arange(len(queries)).split(_EXACT):
            for vectors, block_ids in zip(self._vectors.split(_ROWS), self._ids.split(_ROWS), strict=True):
                products = (queries[part].double() @ to_unit(vectors).double().T).round(decimals=_DECIMALS)
                products.masked_fill_(block_ids == exclude[part].unsqueeze(1), -torch.inf)
                # Ids ascend, so a stable sort leaves the lower of equally near ones in front.
                merged = torch.cat([similarities[part], products], dim=1).sort(
                    dim=1, descending=True, stable=True
                )
                columns = torch.cat([ids[part], block_ids.expand(len(part), -1)], dim=1)
                similarities[part] = merged.values[:, :k]
                ids[part] = columns.gather(1, merged.indices[:, :k])
        ids = ids.masked_fill(similarities.isinf(), -1)
        similarities, ids = _merge(group.gather(similarities), group.gather(ids))
        return similarities[:, :k], ids[:, :k]


def _copy_to_gpu(faiss: ModuleType, features: Tensor, device: torch.device) -> Any:
    """Copy the bank to an index on the GPU, for the search of candidates; None if that is not possible."""
    if device.type != "cuda" or len(features) == 0 or not getattr(faiss, "get_num_gpus", int)():
        return None
    resources = faiss.StandardGpuResources()
    try:
        made = faiss.index_cpu_to_gpu(resources, device.index or 0, faiss.IndexFlatIP(features.shape[1]))
        for block in features.split(_ROWS):
            made.add(to_unit(block).numpy())
    except RuntimeError:  # the bank does not fit; the CPU finds the same neighbours
        return None
    made.resources = resources  # lives as long as the index
    return made


def load_faiss() -> ModuleType:
    """Import FAISS with the matrix kernels that suit the processor.

    The OpenBLAS inside faiss-cpu's wheel does not detect processors newer than 2021 and selects kernels that
    are four times slower than necessary (measured on Sapphire Rapids). It reads OPENBLAS_CORETYPE at import.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    kernels = _KERNELS.get(torch.backends.cpu.get_cpu_capability())
    chosen = kernels is not None and "faiss" not in sys.modules and "OPENBLAS_CORETYPE" not in os.environ
    if chosen:
        os.environ["OPENBLAS_CORETYPE"] = str(kernels)
    try:
        faiss = require("faiss", extra="knn")
    finally:
        if chosen:
            del os.environ["OPENBLAS_CORETYPE"]  # other libraries select their own kernels
    faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = _BLOCK
    return faiss


def _merge(similarities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the candidates [world, Q, M] of all ranks into one row per query, sorted: [Q, world * M]."""
    return _sort(similarities.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1))


def _sort(similarities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by similarity, the highest first, then by id."""
    ids, order = ids.sort(dim=1, stable=True)
    similarities, order = similarities.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarities, ids.gather(1, order)


# Letters: B queries, C classes, k neighbours.


def vote(
    similarities: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    *,
    num_classes: int,
    temperature: float,
    places: int = 5,
) -> dict[int, Tensor]:
    """Return for each k the classes with most votes, [B, places] int64, padded by -1.

    A neighbour of similarity s votes exp(s / temperature) for its class. The sums are computed in float64
    relative to the nearest neighbour's vote, which does not change the order; ties go to the lower class.

    Args:
        similarities: [B, k] cosines, the nearest first.
        labels: [B, k] classes, -1 for a missing neighbour.
        ks: each uses the first k columns, or all of them if there are fewer.

    Raises:
        DataError: a temperature that is not above zero.
    """
    if not 0 < temperature < float("inf"):
        raise DataError(f"a temperature of {temperature} gives no weights; give one above 0, such as 0.07")
    scaled = (similarities.double() - similarities[:, :1].double()) / temperature
    weights = scaled.exp().masked_fill(labels < 0, 0.0)
    totals = torch.zeros(len(labels), num_classes, dtype=torch.float64)  # O(B C), never O(B k C)
    rankings, done = {}, 0
    for k in sorted(set(ks)):
        totals.scatter_add_(1, labels[:, done:k].clamp(min=0), weights[:, done:k])
        done = min(k, labels.shape[1])
        values, classes = totals.sort(dim=1, descending=True, stable=True)
        ranked = classes.masked_fill(values <= 0, -1)[:, :places]
        rankings[k] = F.pad(ranked, (0, places - ranked.shape[1]), value=-1)
    return rankings


_VOTES = 4096  # queries whose votes are counted at once


def count_votes(
    neighbours: Neighbours, bank_labels: Tensor, ks: Sequence[int], *, num_classes: int, temperature: float
) -> dict[int, Tensor]:
    """Return for each k the five classes with most votes [Q, 5]; the neighbours' ids index the labels."""
    labels = bank_labels[neighbours.ids.clamp(min=0)].masked_fill(neighbours.ids < 0, -1)
    blocks = zip(neighbours.similarities.split(_VOTES), labels.split(_VOTES), strict=True)
    parts = [vote(*block, ks, num_classes=num_classes, temperature=temperature) for block in blocks]
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


# The same on plain arrays, for features that were computed elsewhere.


class KnnResult(NamedTuple):
    """Result of `knn`; both fields are by k."""

    accuracies: dict[int, float]  # top-1 in percent
    predictions: dict[int, NDArray[Any]]  # [Q], in the values of the labels


def knn(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    queries: ArrayLike | Tensor | None = None,
    query_labels: ArrayLike | Tensor | None = None,
    *,
    k: int | Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> KnnResult:
    """Classify features by the weighted votes of their nearest neighbours, as `radio-eval knn` does.

    Args:
        features: [N, C] vectors of the bank, of any length, since cosines are compared.
        labels: [N] classes of the bank, integers or strings.
        queries: [Q, C] vectors to classify (default: the bank's own, each without itself).
        query_labels: [Q] classes of the queries, all of which the bank has.
        k: number of neighbours that vote; several are scored from one search.
        temperature: a neighbour of similarity s votes exp(s / temperature).

    Raises:
        DataError: arrays of another shape, values that are no finite numbers, labels that the bank lacks, a k
            larger than the bank, or a temperature that is not above zero.
        MissingExtraError: FAISS is not installed.
    """
    bank = _features(features, "features")
    bank_labels = _labels(labels, len(bank), "labels")
    if (queries is None) != (query_labels is None):
        raise DataError("queries and query_labels belong together; give both, or neither for leave-one-out")
    vectors, truth = bank, bank_labels
    exclude: Tensor | None = torch.arange(len(bank))
    if queries is not None and query_labels is not None:
        vectors = _features(queries, "queries")
        truth, exclude = _labels(query_labels, len(vectors), "query_labels"), None
    if vectors.shape[1] != bank.shape[1]:
        raise DataError(f"queries of width {vectors.shape[1]} do not fit features of width {bank.shape[1]}")
    ks = _sizes(k, len(bank) - (exclude is not None))
    classes, numbers = np.unique(bank_labels, return_inverse=True)
    _check_known(truth, classes)
    neighbours = Index(bank, torch.arange(len(bank))).search(vectors, max(ks), exclude=exclude)
    rankings = count_votes(
        neighbours, torch.from_numpy(numbers), ks, num_classes=len(classes), temperature=temperature
    )
    predictions = {size: classes[rankings[size][:, 0].numpy()] for size in ks}
    accuracies = {size: 100 * float((predictions[size] == truth).mean()) for size in ks}
    return KnnResult(accuracies, predictions)


def _features(values: ArrayLike | Tensor, what: str) -> Tensor:
    """Convert features to [N, C] float32 on the CPU."""
    try:
        tensor = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what}: no array of numbers ({error}); wanted [N, C]") from error
    if tensor.is_complex() or tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(
            f"{what}: {tensor.dtype} {list(tensor.shape)}; wanted one row [C] of real numbers each"
        )
    tensor = tensor.float()
    rows = (~tensor.isfinite().all(dim=1)).nonzero().flatten()
    if len(rows):
        raise DataError(f"{what}: row {int(rows[0])} is not finite ({len(rows)} of {len(tensor)} are not)")
    return tensor


def _labels(values: ArrayLike | Tensor, count: int, what: str) -> NDArray[Any]:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{what}: no array ({error}); wanted one class each") from error
    if array.shape != (count,):
        raise DataError(
            f"{what}: shape {list(array.shape)} for {count} rows of features; wanted one class each"
        )
    if array.dtype.kind not in "iuUb":
        raise DataError(f"{what}: of type {array.dtype}; wanted whole numbers or texts")
    return array


def _sizes(k: int | Sequence[int], available: int) -> list[int]:
    sizes = np.atleast_1d(np.asarray(k))
    if sizes.ndim != 1 or not len(sizes) or sizes.dtype.kind not in "iu":
        raise DataError(f"k = {k!r}; wanted a whole number, or several")
    if sizes.min() < 1 or sizes.max() > available:
        raise DataError(f"k = {k!r}: a query has {available} neighbours; give numbers from 1 to that")
    return [int(size) for size in sizes]


def _check_known(labels: NDArray[Any], classes: NDArray[Any]) -> None:
    if (labels.dtype.kind == "U") != (classes.dtype.kind == "U"):
        raise DataError(f"query_labels are {labels.dtype} and labels {classes.dtype}; give both alike")
    foreign = np.setdiff1d(labels, classes)
    if len(foreign):
        raise DataError(
            f"query_labels: {len(foreign)} classes that labels lack, the first is {foreign[0]!r}; "
            f"labels have {len(classes)}, from {classes[0]!r} to {classes[-1]!r}"
        )

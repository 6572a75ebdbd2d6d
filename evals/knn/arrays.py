"""k-NN on plain arrays, for features that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from radio.errors import DataError

from .index import Index, count_votes

# Letters: N bank, Q queries, C feature width.


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

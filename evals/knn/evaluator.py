"""k-NN classification of frozen summaries, without training anything (Z. Wu et al. 2018)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
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
from evals.core.evaluator import EvalRun, Result
from evals.core.features import StoredFeatures, check_head, to_teacher_space
from evals.core.report import Metric
from evals.core.stats import proportion
from radio.data import (
    ImageSource,
    aligned_labels,
    are_wordnet_ids,
    composed,
    imagenet_numbers,
    order_by_number,
    shown_order,
)
from radio.errors import DataError, shown
from radio.io import MAX_DATA_BYTES, parse_json, read_text, validate
from radio.types import Backbone

from . import KnnSettings
from .index import Index, Neighbours, count_votes, load_faiss

# Letters: N bank, Q queries, C summary width, k neighbours.

_SHOWN_NEIGHBOURS = 5  # of a misclassified image


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

    shard = stored.load(run.ranks.rank, run.ranks.world)  # of the bank
    features = to_teacher_space(model, settings.head, shard.features)
    all_ids, bank_labels = stored.indices(), torch.from_numpy(bank_source.labels)
    whole = settings.leave_one_out and run.ranks.world == 1  # then they need not be loaded again
    queries = features if whole else to_teacher_space(model, settings.head, stored_queries.features)
    query_ids = stored_queries.indices()
    labels = torch.from_numpy(aligned_labels(query_source, bank_source))[query_ids]
    exclude = query_ids if settings.leave_one_out else None

    def search(bank: Tensor, ids: Tensor, k: int) -> Neighbours:
        most = min(k, max(len(all_ids), 1))  # more do not exist and would take memory
        return Index(bank, ids, run.device).search(queries, most, exclude=exclude, group=run.ranks)

    def classify(neighbours: Neighbours, ks: Sequence[int]) -> dict[int, Tensor]:
        return count_votes(
            neighbours, bank_labels, ks, num_classes=len(classes), temperature=settings.temperature
        )

    k = settings.main_k
    neighbours = search(features, shard.indices, max(settings.k))
    rankings = classify(neighbours, settings.k)
    neighbours = Neighbours(neighbours.similarities[:, :k], neighbours.ids[:, :k])
    ranking = rankings[k]
    metrics = accuracies(rankings, labels, len(classes), k)
    for per_class in settings.few_shot:
        tops = []
        for seed in range(settings.tries):
            chosen = choose(all_ids, bank_labels[all_ids], per_class, seed)
            local = torch.isin(shard.indices, chosen)
            tops.append(classify(search(features[local], shard.indices[local], k), (k,))[k][:, 0])
        shares = [100 * float((top == labels).double().mean()) for top in tops]
        metrics[f"top1_few_shot_{per_class}"] = mean_of_tries(shares)
    if accepted is not None:
        metrics["top1_real"] = real_accuracy(ranking, [accepted[i] for i in query_ids.tolist()])

    available = len(all_ids) - settings.leave_one_out
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
    ks, counts = sorted(set(settings.k)), sorted(set(settings.few_shot))
    for name in ("top1", "top5"):
        if name in metrics and len(ks) > 1:
            y_label = f"top-{name[3:]} (%)"
            points = {k: metrics[name if k == settings.main_k else f"{name}_k{k}"] for k in ks}
            caption = "Accuracy over the number of neighbours that vote, with 95 % intervals."
            yield _line(f"{y_label} over k", "k", y_label, points, caption)
    if len(counts) > 1:
        points = {count: metrics[f"top1_few_shot_{count}"] for count in counts}
        caption = "Accuracy with few labelled images, ± one standard deviation over tries."
        yield _line("top-1 over the images a class", "images a class", "top-1 (%)", points, caption)


def _line(title: str, x_label: str, y_label: str, points: Mapping[int, Metric], caption: str) -> Lines:
    """Draw metrics with their intervals, or with their standard deviations where they have none."""
    values = points.values()
    return Lines(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x=tuple(map(float, points)),
        y=tuple(m.value for m in values),
        low=tuple(m.value - (m.std or 0) if m.low is None else m.low for m in values),
        high=tuple(m.value + (m.std or 0) if m.high is None else m.high for m in values),
        log_x=True,
        caption=caption,
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


# Top-1 against several accepted labels per image (L. Beyer et al. 2020, ImageNet-ReaL).

_NUMBER_AT_END = re.compile(r"(?<![0-9])0*([0-9]{1,9})$")

_Labels = list[Annotated[int, Field(ge=0, lt=2**31)]]
_Accepted = list[_Labels] | dict[str, _Labels]
_BY_NUMBER = TypeAdapter(list[_Labels])
_BY_NAME = TypeAdapter(dict[str, _Labels])
_ABSENT = -2  # a class that the bank does not have; -1 is no prediction


def real_accuracy(ranking: Tensor, accepted: Sequence[frozenset[int]]) -> Metric:
    """Compute top-1 against several accepted labels (L. Beyer et al. 2020), without images that have none.

    Args:
        ranking: [Q, 5] predictions.
        accepted: [Q], as `read_accepted` returns them.

    Raises:
        DataError: no image has a label.
    """
    judged = [(int(top), allowed) for top, allowed in zip(ranking[:, 0], accepted, strict=True) if allowed]
    if not judged:
        raise DataError("the file of accepted labels accepts none for any of the images")
    return proportion(sum(top in allowed for top, allowed in judged), len(judged))


def read_accepted(path: Path, keys: Sequence[str], classes: Sequence[str]) -> list[frozenset[int]]:
    """Read the accepted classes of each image, as indices into `classes`; -2 for classes outside them.

    Args:
        keys: [Q] names. If the file is a list, the number at the end of a name (`..._00000001.JPEG`) is the
            index from 1; if it is an object, the name without folders, with or without its extension, is the
            key.
        classes: of the bank. WordNet ids and numbers map to their class numbers in the file, other names to
            their indices.

    Raises:
        DataError: not such a file, an image without an entry or with the entry of another, classes whose
            numbers are ambiguous or unknown, or no label for any image.
    """
    accepted = _read(path)
    places = _places_by_number(classes, accepted, path)
    entries = [_entry(accepted, key, path) for key in keys]
    _check_own_entries(entries, keys, path)
    if not any(numbers for _, numbers in entries):
        raise DataError(f"{shown(path)}: accepts no label for any of the images")
    return [frozenset(places.get(number, _ABSENT) for number in numbers) for _, numbers in entries]


def _read(path: Path) -> _Accepted:
    if not path.exists():
        raise DataError(f"{shown(path)}: no such file of accepted labels")
    data = parse_json(read_text(path, limit=MAX_DATA_BYTES), path)
    where = f"{shown(path)}: wanted a list (or an object) of lists of class numbers"
    if not isinstance(data, dict):
        return validate(_BY_NUMBER, data, where)
    by_name = {composed(key): numbers for key, numbers in validate(_BY_NAME, data, where).items()}
    if len(by_name) < len(data):
        raise DataError(f"{shown(path)}: has names that differ only in how their accents are written")
    return by_name


def _places_by_number(classes: Sequence[str], accepted: _Accepted, path: Path) -> dict[int, int]:
    """Map the class numbers of the file to indices into `classes`."""
    if are_wordnet_ids(classes) and all(name in imagenet_numbers() for name in classes):
        return {imagenet_numbers()[name]: place for place, name in enumerate(classes)}
    if all(name.isdecimal() for name in classes):
        by_number = {int(name): place for place, name in enumerate(classes)}
        if len(by_number) < len(classes):
            raise DataError("the bank has several classes of one number, such as 1 and 01; make them one")
        return by_number
    entries = accepted.values() if isinstance(accepted, dict) else accepted
    most = max((number for numbers in entries for number in numbers), default=0)
    if most >= len(classes):
        raise DataError(
            f"the bank has {len(classes)} classes and {shown(path)} accepts {most}; class numbers need all "
            f"{most + 1} folders, or folders that are called by WordNet ids or numbers"
        )
    order = order_by_number(classes)
    if order != list(range(len(classes))):
        raise DataError(
            f"the bank's classes are {shown_order(classes, range(len(classes)))} by their letters and "
            f"{shown_order(classes, order)} by their numbers, so the class numbers of {shown(path)} may mean "
            f"either; call the folders by the numbers alone"
        )
    return {place: place for place in range(len(classes))}


def _entry(accepted: _Accepted, key: str, path: Path) -> tuple[str | int, list[int]]:
    """Return the key or number of an image's entry in the file, and the entry."""
    name = PurePosixPath(composed(key))
    if isinstance(accepted, dict):
        for candidate in (composed(key), name.name, name.stem):
            if candidate in accepted:
                return candidate, accepted[candidate]
        raise DataError(f"{path}: has no entry for {key}")
    number = _NUMBER_AT_END.search(name.stem)
    place = int(number.group(1)) if number else 0
    if not 1 <= place <= len(accepted):
        raise DataError(
            f"{path}: has {len(accepted)} entries, and {key} does not end in a number from 1 to that"
        )
    return place, accepted[place - 1]


def _check_own_entries(
    entries: Sequence[tuple[str | int, list[int]]], keys: Sequence[str], path: Path
) -> None:
    owners: dict[str | int, str] = {}
    for (entry, _), key in zip(entries, keys, strict=True):
        other = owners.setdefault(entry, key)
        if other != key:
            raise DataError(
                f"{path}: {other} and {key} would both have its entry {entry}; give each image a name or "
                f"number of its own"
            )

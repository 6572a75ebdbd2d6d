"""Zero-shot scoring of images against texts through a CLIP teacher's text tower, without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.core.classification import (
    class_table,
    confusions,
    mean_class,
    top_accuracies,
    wrong_examples,
)
from evals.core.evaluator import EvalRun, Result
from evals.core.features import (
    StoredFeatures,
    check_finite,
    to_teacher_space,
)
from evals.core.report import Metric
from evals.core.stats import proportion
from radio.data import ImageSource
from radio.errors import ConfigError, require
from radio.types import Backbone

from . import ZeroshotSettings
from .data import Captioned, Named, name_classes, open_captions, read_templates
from .texts import TextHead, classifier, find_text_tower, text_vectors

# Letters: N images, C summary width, E text width, K classes.

_RECALLS = (1, 5, 10)


def missing_requirements(model: Backbone) -> str:
    """Explain why the model has no text tower; empty if it has one."""
    try:
        find_text_tower(model)
    except ConfigError as error:
        return str(error)
    return ""


def evaluate(model: Backbone, settings: ZeroshotSettings, run: EvalRun) -> Result:
    """Score a model whose summary lies in, or can be mapped to, the space of a text tower.

    Raises:
        ConfigError: the model has no text tower, or an unknown device.
        CheckpointError: the text tower's weights are not at the path in the checkpoint.
        DataError: data that are absent, damaged, or whose classes have no names.
        RadioError: a name or caption that the text tower cannot encode.
        MissingExtraError: open_clip is not installed.
    """
    require("open_clip", extra="zeroshot")  # raises here rather than after the extraction
    head = find_text_tower(model, settings.text)
    score = _classify if settings.captions is None else _retrieve
    return score(model, settings, run, head)


def _classify(model: Backbone, settings: ZeroshotSettings, run: EvalRun, head: TextHead) -> Result:
    source = run.open_images(settings.query or "scenes:val", scenes=settings.scenes)
    named = name_classes(source, settings.class_names)
    templates = read_templates(settings.templates, scenes=source.location.startswith("scenes:"))
    columns = classifier(head.tower, named.names, templates, run)
    stored, images = _project(model, settings, run, head, source)
    ranking = rank_classes(images, columns)
    labels = torch.from_numpy(named.labels)[stored.indices()]
    chance = 100 / len(named.names)

    def logits(row: int) -> tuple[str, ...]:
        best = zip(ranking.classes[row].tolist(), ranking.cosines[row].tolist(), strict=True)
        texts = [f"{named.names[label]} {100 * cosine:.1f}" for label, cosine in best if label >= 0]
        return (", ".join(texts),)

    return Result(
        metrics={
            **top_accuracies(ranking.classes, labels, len(named.names)),
            "mean_class": mean_class(ranking.classes, labels),
        },
        baselines={"chance": chance},
        data=[stored.info("query", num_classes=len(named.names))],
        records=_class_records(stored, named, ranking, labels),
        blocks=[
            confusions(ranking.classes, labels, named.names),
            *wrong_examples(
                run,
                source,
                stored.indices(),
                ranking.classes,
                labels,
                ranking.cosines[:, 0],
                named.names,
                title="wrong and sure of it, one image for each pair of classes, with 100 times the cosines",
                details=logits,
            ),
            class_table(ranking.classes, labels, named.names),
        ],
        resolved={**_resolved(head), "templates": len(templates), "chance": chance},
        notes=named.notes,
    )


def _retrieve(model: Backbone, settings: ZeroshotSettings, run: EvalRun, head: TextHead) -> Result:
    assert settings.captions is not None, "the caller has looked"
    captioned = open_captions(
        settings.captions,
        settings.images,
        limit=run.settings.limit,
        scenes=settings.scenes,
        seed=run.settings.seed,
        memo=run.fingerprints,
    )
    vectors = text_vectors(head.tower, captioned.texts, run)
    stored, images = _project(model, settings, run, head, captioned.source)
    readable, owners = _readable(captioned, stored.indices())
    to_text = image_to_text(images, vectors[readable], owners)
    to_image = text_to_image(images, vectors[readable], owners)
    texts = [captioned.texts[index] for index in readable.tolist()]
    return Result(
        metrics={
            **{f"image_to_text_r{k}": _recall(to_text, k) for k in _RECALLS},
            **{f"text_to_image_r{k}": _recall(to_image, k) for k in _RECALLS},
        },
        data=[stored.info("images", num_classes=0)],
        records=_retrieval_records(stored.keys, to_text, texts, owners, to_image),
        resolved={**_resolved(head), "captions": len(texts)},
    )


def _project(
    model: Backbone, settings: ZeroshotSettings, run: EvalRun, head: TextHead, source: ImageSource
) -> tuple[StoredFeatures, Tensor]:
    """Extract the summaries of a source; return them as stored, and [N, E] in the texts' space."""
    stored = run.features(model, source, settings)
    projected = head.tower.project(to_teacher_space(model, head.head, stored.features))
    check_finite(projected, f"{model.name} in the space of {head.teacher}'s texts")
    return stored, projected


def _resolved(head: TextHead) -> dict[str, Any]:
    features = "summary" if head.head is None else f"adaptor {head.head}"
    return {"features": features, "text": head.teacher}


def _readable(captioned: Captioned, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Select the captions of the readable images; return their indices, and the rows of their images."""
    rows = torch.full((len(captioned.source.keys),), -1)
    rows[indices] = torch.arange(len(indices))
    owners = rows[captioned.owners]
    readable = (owners >= 0).nonzero().flatten()
    return readable, owners[readable]


def _recall(before: Tensor, k: int) -> Metric:
    return proportion(int((before < k).sum()), len(before))


def _class_records(
    stored: StoredFeatures, named: Named, ranking: Ranking, labels: Tensor
) -> Iterator[dict[str, Any]]:
    """Yield a record per image: its class, the five best, and their logits (100 times the cosine)."""
    for row, key in enumerate(stored.keys):
        classes = [label for label in ranking.classes[row].tolist() if label >= 0]
        yield {
            "id": key,
            "score": int(classes[0] == int(labels[row])),
            "label": named.names[int(labels[row])],
            "predictions": [named.names[label] for label in classes],
            "logits": [round(100 * value, 4) for value in ranking.cosines[row, : len(classes)].tolist()],
        }


def _retrieval_records(
    keys: list[str], to_text: Tensor, texts: list[str], owners: Tensor, to_image: Tensor
) -> Iterator[dict[str, Any]]:
    """Yield a record per image, then one per caption, with ranks from 1."""
    for key, before in zip(keys, to_text.tolist(), strict=True):
        yield {"id": key, "part": "images", "rank": before + 1}
    for index, (text, owner, before) in enumerate(
        zip(texts, owners.tolist(), to_image.tolist(), strict=True)
    ):
        yield {"id": index, "part": "captions", "caption": text, "image": keys[owner], "rank": before + 1}


# Letters: N images, K classes, M captions, E width, b rows of a block.

# Ranks come from products in float64 that are rounded far below the noise of float32 features: equal vectors
# then tie exactly, ties go to the lower index, and no rank depends on the size of a block.
_DECIMALS = 10
# Classes are ranked by products in float32, and again in float64 where two differ by less than the rounding
# of both: a product of unit vectors of width E is wrong by at most E + 2 roundings.
_ROUNDING = 2.0**-24
_TINY = 1e-300  # below the length of every vector of float32 that is not zero
_CELLS = 1 << 21  # products at once


class Ranking(NamedTuple):
    """The five best classes of each image, padded by -1 and -inf."""

    classes: Tensor  # [N, 5] int64
    cosines: Tensor  # [N, 5] float64


def rank_classes(images: Tensor, classifier: Tensor, places: int = 5) -> Ranking:
    """Rank the classes nearest to each image.

    Args:
        images: [N, E], of any length; normalised here.
        classifier: [E, K] unit columns.
    """
    columns, rough_columns = classifier.double(), classifier.float()
    kept = min(places, columns.shape[1])
    closest = 2 * (len(columns) + 2) * _ROUNDING
    parts = []
    for block in images.split(_rows(columns.shape[1])):
        units = F.normalize(block.double(), dim=1, eps=_TINY)
        rough, classes = (units.float() @ rough_columns).topk(min(kept + 1, columns.shape[1]), dim=1)
        close = (rough[:, :-1] - rough[:, 1:] <= closest).any(dim=1).nonzero().flatten()
        cosines, classes = rough[:, :kept].double(), classes[:, :kept].contiguous()
        if len(close):
            cosines[close], classes[close] = _rank_exactly(units[close], columns, kept)
        parts.append((cosines, classes))
    missing = (0, places - kept)
    values, classes = (torch.cat(part) for part in zip(*parts, strict=True))
    return Ranking(F.pad(classes, missing, value=-1), F.pad(values, missing, value=-torch.inf))


def _rank_exactly(units: Tensor, columns: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Rank in float64, equal cosines by class: cosines and classes [b, kept]."""
    cosines = (units @ columns).round(decimals=_DECIMALS)
    values, classes = cosines.topk(min(kept + 1, columns.shape[1]), dim=1)
    # Only among equal cosines does a full sort find others.
    rows = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().flatten()
    if len(rows):
        classes[rows] = cosines[rows].sort(dim=1, descending=True, stable=True).indices[:, : classes.shape[1]]
    return values[:, :kept], classes[:, :kept]


def image_to_text(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Count the captions ranked before the best of each image's own, [N] int64.

    Args:
        images: [N, E], of any length.
        texts: [M, E] unit vectors.
        owners: [M], each caption's image; every image has one or more.
    """
    rows = F.normalize(images.double(), dim=1, eps=_TINY)
    columns = texts.double().T
    counts = []
    for numbers in torch.arange(len(rows)).split(_rows(len(texts))):
        cosines = (rows[numbers] @ columns).round(decimals=_DECIMALS)  # [b, M]
        own = cosines.masked_fill(owners != numbers.unsqueeze(1), -torch.inf)
        best, place = own.max(dim=1, keepdim=True)
        counts.append(_before(cosines, best, place))
    return torch.cat(counts)


def text_to_image(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Count the images ranked before each caption's own, [M] int64; arguments as in `image_to_text`."""
    columns = F.normalize(images.double(), dim=1, eps=_TINY).T
    counts = []
    for numbers in torch.arange(len(texts)).split(_rows(len(images))):
        cosines = (texts[numbers].double() @ columns).round(decimals=_DECIMALS)  # [b, N]
        place = owners[numbers].unsqueeze(1)
        counts.append(_before(cosines, cosines.gather(1, place), place))
    return torch.cat(counts)


def _before(cosines: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """Count the entries of each row above `value` [b, 1], and equal ones left of `place` [b, 1]: [b]."""
    columns = torch.arange(cosines.shape[1])
    return ((cosines > value) | ((cosines == value) & (columns < place))).sum(dim=1)


def _rows(width: int) -> int:
    return max(1, _CELLS // width)

"""Linear classification of frozen summaries: a head for a data set, other images by it, calibration."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.core.blocks import Bars, Block, Lines, Table
from evals.core.classification import class_table, confusions, mean_class, top_accuracies, wrong_examples
from evals.core.evaluator import EvalRun, Result
from evals.core.features import StoredFeatures
from evals.core.report import DatasetInfo, Metric
from evals.core.stats import interval, proportion, resampled_sums, wilson
from radio.data import ImageSource, SceneImages, aligned_classes
from radio.errors import DataError
from radio.types import Backbone, Features

from . import LinearSettings, Split
from .solvers import (
    PENALTIES,
    RATES,
    TOLERANCE,
    Fit,
    Head,
    LogisticRegression,
    check_memory,
    fit_by_sgd,
    hold_out,
)

# Letters: N images, C width of the summary, D of a token, K classes.

_BINS = 15  # of confidence (Guo et al. 2017)
_SUMMARY, _POOLED = "summary", "summary + mean of the tokens"


class ScoredImages(NamedTuple):
    """Images that a head is scored on."""

    source: ImageSource
    classes: Tensor  # the head's class for each class of the source
    possible: Tensor  # the classes of the head that are told apart


class LinearData(NamedTuple):
    """A data set before any work: what the head is trained on, and what it is scored on by name."""

    train: ImageSource
    scored: dict[str, ScoredImages]  # the first is the data set's own


class Predictions(NamedTuple):
    """What a head says of N images."""

    stored: StoredFeatures
    labels: Tensor  # [N]
    ranking: Tensor  # [N, 5] classes, the best first; -1 is no prediction
    confidence: Tensor  # [N] probability of the first, float64

    @property
    def correct(self) -> Tensor:
        """Whether the first class is right, [N]."""
        return self.ranking[:, 0] == self.labels


class Tried(NamedTuple):
    """What a head was trained with, and its top-1 on the images that decide, if there was a choice."""

    value: float  # C, or the learning rate
    features: str
    converged: bool
    right: int = 0  # of the judged images
    judged: int = 0


class Probe(NamedTuple):
    """The outcome on one data set."""

    train: StoredFeatures
    scored: dict[str, Predictions]
    tried: list[Tried]  # empty where nothing was to be chosen
    chosen: Tried


def evaluate(model: Backbone, settings: LinearSettings, run: EvalRun) -> Result:
    """Train a linear head on each data set, and score it.

    Raises:
        DataError: data that are absent, empty, of one class only, or whose classes do not agree.
        SizeError: a size below one pixel, too many pixels, or features larger than the memory.
    """
    opened = {name: _open(split, settings, run) for name, split in settings.splits.items()}
    width = model.summary_dim + (model.token_dim if settings.solver == "sgd" else 0)
    for each in opened.values():
        check_memory(len(each.train.keys), width, len(each.train.classes), run.device, _dtype(settings))
    probes = {name: _probe(model, each, settings, run) for name, each in opened.items()}
    results = [score(probe, settings, run) for probe in probes.values()]
    parts = zip(probes, results, strict=True)
    result = results[0] if len(results) == 1 else _join(dict(parts), probes)
    chosen = {name or "val": probe.chosen for name, probe in probes.items()}
    return Result(
        metrics=result.metrics,
        baselines={"chance": float(np.mean([100 / len(each.train.classes) for each in opened.values()]))},
        data=result.data,
        records=[record for name, probe in probes.items() for record in _records(name, probe)],
        blocks=result.blocks,
        notes=_notes(probes, settings),
        resolved={
            "lr" if settings.solver == "sgd" else "c": {name: fit.value for name, fit in chosen.items()},
            "features": {name: fit.features for name, fit in chosen.items()},
        },
    )


def _open(split: Split, settings: LinearSettings, run: EvalRun) -> LinearData:
    train = run.open_images(split.train, scenes=settings.scenes[0])
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"{train.name}: holds one class only, so every answer is right; give two or more")
    sources = {"val": run.open_images(split.val, scenes=settings.scenes[1])}
    for domain in settings.chosen_domains:
        count = min(settings.scenes[2], len(sources["val"].keys))
        name = split.val.removeprefix("scenes:")
        sources[domain] = SceneImages(name, count=count, seed=run.settings.seed, domain=domain)
    sources |= {name: run.open_images(text) for name, text in settings.also_by_name.items()}
    scored, everything = dict[str, ScoredImages](), torch.arange(len(train.classes))
    for name, source in sources.items():
        classes = torch.from_numpy(aligned_classes(source, train))
        scored[name] = ScoredImages(source, classes, classes if name in settings.also_by_name else everything)
    return LinearData(train, scored)


def _pool(features: Features) -> Tensor:
    """Put the summary and the mean of the tokens side by side, [B, C + D]."""
    return torch.cat([features.summary, features.tokens.mean(dim=1)], dim=1)


def _probe(model: Backbone, opened: LinearData, settings: LinearSettings, run: EvalRun) -> Probe:
    """Extract the features of all images, train the head on the leading rank, and let it predict."""

    def extract(source: ImageSource) -> StoredFeatures:
        if settings.solver == "logreg":
            return run.features(model, source, settings)
        return run.features(model, source, settings, head=_POOLED, project=_pool)

    train = extract(opened.train)
    stored = {name: extract(images.source) for name, images in opened.scored.items()}
    widths = {_SUMMARY: model.summary_dim}
    if settings.solver == "sgd":
        widths[_POOLED] = model.summary_dim + model.token_dim
    labels = {name: images.classes[stored[name].labels] for name, images in opened.scored.items()}
    started = time.monotonic()

    def work() -> tuple[list[Tried], Tried, dict[str, tuple[Tensor, Tensor]]]:
        judged = stored["val"].features, labels["val"]
        tried, chosen = choose(train.features, train.labels, judged, opened.train, widths, settings, run)
        predicted = {
            name: predict(chosen.head, stored[name].features, images.possible)
            for name, images in opened.scored.items()
        }
        return tried, Tried(chosen.value, chosen.features, chosen.converged), predicted

    tried, chosen, predicted = run.ranks.on_leader(work)
    run.seconds["fit"] = run.seconds.get("fit", 0.0) + time.monotonic() - started
    scored = {name: Predictions(stored[name], labels[name], *predicted[name]) for name in stored}
    return Probe(train, scored, tried, chosen)


def choose(
    features: Tensor,
    labels: Tensor,
    judged: tuple[Tensor, Tensor],
    source: ImageSource,
    widths: Mapping[str, int],
    settings: LinearSettings,
    run: EvalRun,
) -> tuple[list[Tried], Fit]:
    """Train heads, and return what was tried, and the one with the highest top-1; the first of equal ones.

    Args:
        features: [N, C] or [N, C + D].
        labels: [N].
        judged: features and labels of the scored images.
        source: of the training images.
        widths: how many of the features each kind of them has.
    """
    seed = run.settings.seed if settings.head_seed is None else settings.head_seed
    train = partial(_train, features, labels, source=source, settings=settings, run=run, seed=seed)
    values = sorted((settings.c or PENALTIES) if settings.solver == "logreg" else (settings.lr or RATES))
    rows = everything = torch.arange(len(labels))
    if settings.chooses_on == "held-out" and len(values) * len(widths) > 1:
        if len(labels) < 2:
            raise DataError(f"{source.name}: one image that can be read is too few; give two or more")
        rows, held = hold_out(labels, seed)
        judged = features[held], labels[held]
    elif len(values) * len(widths) == 1:
        (only,) = train(rows, values, widths)
        return [], only
    best, most, tried = None, -1, []
    for fit in train(rows, values, widths):
        tops = torch.cat([logits.argmax(dim=1).cpu() for logits in fit.head.logits(judged[0])])
        right = int((tops == judged[1]).sum())
        tried.append(Tried(fit.value, fit.features, fit.converged, right, len(tops)))
        if right > most:
            best, most = fit, right
    assert best is not None
    if len(rows) < len(labels):
        (best,) = train(everything, [best.value], {best.features: widths[best.features]})
    return tried, best


def _train(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    values: list[float],
    widths: Mapping[str, int],
    *,
    source: ImageSource,
    settings: LinearSettings,
    run: EvalRun,
    seed: int,
) -> Iterator[Fit]:
    """Yield a head for each value and each kind of features, trained on some rows."""
    small, num_classes = source.location.startswith("scenes:"), len(source.classes)
    if settings.solver == "logreg":
        dtype = _dtype(settings)
        problem = LogisticRegression(features, labels, rows, num_classes, device=run.device, dtype=dtype)
        with run.progress(f"fitting {source.name}", len(values)) as advance:
            for c in values:
                yield problem.fit(
                    c,
                    max_iterations=settings.max_iterations or 1000,
                    tolerance=settings.tolerance or TOLERANCE,
                )
                advance(1)
        return
    iterations = settings.iterations or (300 if small else 12_500)
    batch = settings.train_batch_size or (256 if small else 1024)
    with run.progress(f"fitting {source.name}", iterations) as advance:
        yield from fit_by_sgd(
            features[rows].to(run.device),
            labels[rows].to(run.device),
            num_classes,
            widths,
            values,
            iterations=iterations,
            batch=batch,
            seed=seed,
            advance=advance,
        )


def _dtype(settings: LinearSettings) -> torch.dtype:
    whole = settings.solver == "logreg" and settings.fit_precision != "fp32"
    return torch.float64 if whole else torch.float32


def predict(head: Head, features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the five most likely of some classes [N, 5], and the probability of the first [N] among them.

    Of equally likely ones the lower class is first.

    Args:
        classes: those that the images may have; the others are left out.
    """
    hidden = torch.ones(len(head.bias), dtype=torch.bool, device=head.bias.device)
    hidden[classes.to(hidden.device)] = False
    rankings, confidences = [], []
    for logits in head.logits(features):
        values, ranked = logits.double().masked_fill(hidden, -torch.inf).sort(stable=True, descending=True)
        ranked = ranked.masked_fill(values.isinf(), -1)[:, :5]
        rankings.append(F.pad(ranked, (0, 5 - ranked.shape[1]), value=-1).cpu())
        confidences.append((values[:, 0] - values.logsumexp(dim=1)).exp().cpu())
    return torch.cat(rankings), torch.cat(confidences)


def score(probe: Probe, settings: LinearSettings, run: EvalRun) -> Result:
    """Compute the metrics of one data set and what the page shows of them."""
    own, classes = probe.scored["val"], probe.train.source.classes
    metrics = top_accuracies(own.ranking, own.labels, len(classes))
    metrics["mean_class"] = mean_class(own.ranking, own.labels)
    metrics["ece"], reliability = calibrate(own.confidence, own.correct)
    for name, other in list(probe.scored.items())[1:]:
        metrics[f"top1_{name}"] = proportion(int(other.correct.sum()), len(other.labels))
        metrics[f"ece_{name}"], _ = calibrate(other.confidence, other.correct)
    if domains := [probe.scored[domain] for domain in settings.chosen_domains]:
        metrics["drop"] = _drop(own, domains, run.settings.seed)
    blocks: list[Block] = [*_curves(probe.tried, settings), reliability]
    if len(probe.scored) > 1:
        blocks.append(_bars("top-1 of the same head", {n: p.correct for n, p in probe.scored.items()}))
    blocks.append(confusions(own.ranking, own.labels, classes))
    if len(settings.splits) == 1:
        blocks += wrong_examples(
            run,
            own.stored.source,
            own.stored.indices(),
            own.ranking,
            own.labels,
            own.confidence,
            classes,
            title="wrong and sure of it, one image for each pair of classes",
        )
    blocks.append(class_table(own.ranking, own.labels, classes))
    data = [
        probe.train.info("train", scored=False),
        *(each.stored.info(name) for name, each in probe.scored.items()),
    ]
    return Result(metrics=metrics, data=data, blocks=blocks)


def calibrate(confidence: Tensor, correct: Tensor) -> tuple[Metric, Lines]:
    """Compute the expected calibration error in percent (Guo et al. 2017), and draw its reliability diagram.

    Of 15 equally wide bins of confidence, each closed above: the distance of accuracy and mean confidence,
    weighted by the images.

    Args:
        confidence: [N], 0 to 1.
        correct: [N].
    """
    bins = (confidence.double() * _BINS).ceil().long().sub(1).clamp(0, _BINS - 1)
    counts = bins.bincount(minlength=_BINS)
    sums = bins.bincount(weights=confidence.double(), minlength=_BINS)
    right = bins.bincount(weights=correct.double(), minlength=_BINS)
    error = float((right - sums).abs().sum() / len(bins))
    there = counts.nonzero().flatten().tolist()
    bounds = [wilson(float(right[place]), int(counts[place])) for place in there]
    lines = Lines(
        title="reliability",
        x_label="confidence (%)",
        y_label="top-1 (%)",
        x=tuple(100 * float(sums[place] / counts[place]) for place in there),
        y=tuple(100 * float(right[place] / counts[place]) for place in there),
        low=tuple(100 * low for low, _ in bounds),
        high=tuple(100 * high for _, high in bounds),
        caption=f"Accuracy over the mean confidence of {_BINS} equally wide bins, with 95 % intervals; a "
        f"calibrated model is on the diagonal.",
    )
    return Metric(value=100 * error, higher_is_better=False), lines


def _drop(own: Predictions, domains: list[Predictions], seed: int) -> Metric:
    """Compute the mean loss of top-1 in the domains on the same scenes, with a bootstrap over scenes."""
    count = len(domains[0].labels)
    there = torch.stack([each.correct.double() for each in domains]).mean(dim=0)
    losses = (own.correct[:count].double() - there).unsqueeze(1).numpy()
    low, high = interval(100 * resampled_sums(losses, seed=seed)[:, 0] / count)
    return Metric(value=100 * float(losses.mean()), low=low, high=high, higher_is_better=False)


def _curves(tried: list[Tried], settings: LinearSettings) -> Iterator[Lines]:
    """Yield top-1 over C, or over the learning rate for each kind of features."""
    of_c = settings.solver == "logreg"
    for kind in dict.fromkeys(each.features for each in tried):
        points = [each for each in tried if each.features == kind]
        tops = [proportion(each.right, each.judged) for each in points]
        if len(points) > 1:
            yield Lines(
                title="top-1 over C" if of_c else f"top-1 over the learning rate, {kind}",
                x_label="C" if of_c else "learning rate",
                y_label=f"top-1 of {settings.chooses_on} images (%)",
                x=tuple(each.value for each in points),
                y=tuple(top.value for top in tops),
                low=tuple(top.low for top in tops),
                high=tuple(top.high for top in tops),
                log_x=True,
                caption="What the choice was made by, with 95 % intervals.",
            )


def _bars(title: str, correct: Mapping[str, Tensor]) -> Bars:
    metrics = [proportion(int(each.sum()), len(each)) for each in correct.values()]
    return Bars(
        title=title,
        x_label="top-1 (%)",
        names=tuple(correct),
        values=tuple(metric.value for metric in metrics),
        low=tuple(metric.low for metric in metrics),
        high=tuple(metric.high for metric in metrics),
    )


def _join(results: Mapping[str, Result], probes: Mapping[str, Probe]) -> Result:
    """Join the results on several data sets: the primary metric is the mean of their top-1."""
    tops = [result.metrics["top1"] for result in results.values()]
    below, above = (
        math.sqrt(sum((metric.value - (bound or 0.0)) ** 2 for metric, bound in pairs)) / len(tops)
        for pairs in ([(m, m.low) for m in tops], [(m, m.high) for m in tops])
    )  # of independent sets (Zou and Donner 2008)
    mean = float(np.mean([metric.value for metric in tops]))
    metrics = {"top1": Metric(value=mean, low=mean - below, high=mean + above)}
    rows, data = list[tuple[str | float, ...]](), list[DatasetInfo]()
    for name, result in results.items():
        metrics |= {f"{metric}_{name}": value for metric, value in result.metrics.items()}
        kept = ("top1", "mean_class", "ece")
        rows.append((name, probes[name].chosen.value, *(result.metrics[metric].value for metric in kept)))
        data += [replace(info, role=f"{info.role} of {name}") for info in result.data]
    columns = ("data set", "chosen", "top1", "mean class", "ece")
    table = Table(title="each data set", columns=columns, rows=tuple(rows), compared="top1")
    bars = _bars("top-1 of each data set", {name: p.scored["val"].correct for name, p in probes.items()})
    return Result(metrics=metrics, data=data, blocks=[bars, table])


def _records(name: str, probe: Probe) -> Iterator[dict[str, Any]]:
    """Yield a record per scored image: its label, its predictions, and how sure the first one is."""
    own, classes = probe.scored["val"], probe.train.source.classes
    part = {"part": name} if name else {}
    for row, key in enumerate(own.stored.keys):
        yield {
            "id": key,
            **part,
            "score": int(own.correct[row]),
            "label": classes[int(own.labels[row])],
            "predictions": [classes[label] for label in own.ranking[row].tolist() if label >= 0],
            "confidence": round(float(own.confidence[row]), 6),
        }


def _notes(probes: Mapping[str, Probe], settings: LinearSettings) -> list[str]:
    notes = []
    if settings.solver == "sgd":
        notes.append("trained on cached features of one crop an image; DINOv2's crops are random")
    if settings.chooses_on == "scored" and any(probe.tried for probe in probes.values()):
        notes.append("the head was chosen on the images that it is scored on, as DINOv2 does")
    for name, probe in probes.items():
        stopped = sum(not each.converged for each in probe.tried)
        source = name or probe.train.source.name
        if stopped:
            notes.append(
                f"{source}: {stopped} of {len(probe.tried)} fits ended at --max-iterations, the chosen one "
                f"{'did not' if probe.chosen.converged else 'too'}"
            )
        elif not probe.chosen.converged:
            notes.append(f"{source}: the fit ended at --max-iterations")
    return notes

"""k-NN classification of frozen summaries, without training anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from evals.core.accuracy import class_table
from evals.core.evaluator import domain_notes, machine_settings
from evals.core.features import Extraction, Stored, extract
from evals.core.plan import make_extraction, resolved, to_teacher_space
from evals.core.report import DataUsed, Metric, Report, file_name, write
from radio.chunks import Damage, default_cache
from radio.config import to_plain
from radio.data import aligned_labels, open_source
from radio.dist import Group, current
from radio.errors import DataError
from radio.progress import ProgressFactory, no_progress
from radio.provenance import commit, describe_device, peak_memory, versions
from radio.types import Backbone

from .classify import Classifier, Sets, make_classifier
from .index import load_faiss
from .records import records_of
from .scoring import accuracies, read_accepted, real_accuracy
from .settings import KnnSettings

# Letters: Q queries.


@final
class KnnEvaluator:
    """Scores any backbone by the votes of the nearest neighbours of each query."""

    name = "knn"
    settings = KnnSettings

    def run(
        self,
        model: Backbone,
        settings: KnnSettings,
        out: Path,
        *,
        name: str | None = None,
        watch: ProgressFactory = no_progress,
        group: Group | None = None,
    ) -> Report:
        """Score `model` and write `knn-NAME.json` and `knn-NAME.jsonl` (one line per query) into `out`.

        A head adds `-HEAD-head` to the name, so that it does not overwrite the model's own scores.

        Every rank of a torchrun job calls this and gets the same report; rank 0 writes.

        Raises:
            DataError: data that are absent, empty, of one class only, or whose classes do not agree.
            ConfigError: an unknown device, or a head that the model does not have.
            SizeError: a size below one pixel, or too many pixels.
            MissingExtraError: FAISS is not installed.
        """
        load_faiss()  # raises here rather than after the extraction
        started = time.monotonic()
        group = group or current()
        cache = settings.cache or default_cache()
        sets = _open(settings, cache / "fingerprints", watch)
        accepted = None
        if settings.real_labels is not None:
            accepted = read_accepted(settings.real_labels, sets.asked.keys, sets.bank.classes)
        how, notes = make_extraction(model, settings, settings.head)
        damage = Damage()
        extracting = partial(extract, cache=cache, group=group, watch=watch, damage=damage)
        bank = asked = extracting(model, sets.bank, how)
        if sets.query is not None:
            asked = extracting(model, sets.query, how)
        extracted = time.monotonic()

        carried = partial(to_teacher_space, model, settings.head)
        classifier = make_classifier(sets, bank, asked, settings, group, carried, how.device)
        neighbours, rankings = classifier.classify()
        ranking = rankings[settings.primary_metric]
        metrics = _score(classifier, rankings, accepted)
        finished = time.monotonic()

        label = (name or model.name) + (f"-{settings.head}-head" if settings.head else "")
        base = file_name(self.name, label)
        sources = [sets.bank] if sets.query is None else [sets.bank, sets.query]
        told = dict.fromkeys(note for source in sources for note in source.notes)
        report = Report(
            task=self.name,
            model=label,
            fingerprint=model.fingerprint,
            primary_metric="top1",
            metrics=metrics,
            settings={**to_plain(settings), "resolved": _resolved(classifier, how)},
            data=_data_used(sets, bank, asked),
            device=describe_device(how.device),
            seconds={
                "features": extracted - started,
                "search": finished - extracted,
                "total": finished - started,
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            git=commit(),
            metadata=dict(model.metadata),
            machine_settings=machine_settings(settings),
            peak_memory=peak_memory(how.device),
            notes=(*notes, *_clamped(classifier), *damage.notes(group), *told, *domain_notes(model, sources)),
            tables={"classes": class_table(ranking, classifier.labels, sets.bank.classes)},
            files=(f"{base}.jsonl",),
        )
        if group.leads:
            records = records_of(sets, classifier.queries, classifier.labels, neighbours, ranking)
            write(report, out / f"{base}.json", {out / f"{base}.jsonl": records})
        return report


def _open(settings: KnnSettings, memo: Path, watch: ProgressFactory) -> Sets:
    bank = open_source(
        settings.bank or "scenes:train",
        limit=settings.limit,
        scenes=settings.scenes[0],
        seed=settings.seed,
        memo=memo,
        watch=watch,
    )
    if len(np.unique(bank.labels)) < 2:
        raise DataError(
            f"{bank.name}: holds one class only, so every vote is right; give two classes or more"
        )
    if settings.leave_one_out:
        return Sets(bank, None)
    query = open_source(
        settings.query or "scenes:val",
        limit=settings.limit,
        scenes=settings.scenes[1],
        seed=settings.seed,
        memo=memo,
        watch=watch,
    )
    aligned_labels(query, bank)  # raises here rather than after the extraction
    return Sets(bank, query)


def _score(
    classifier: Classifier, rankings: Mapping[int, Tensor], accepted: Sequence[frozenset[int]] | None
) -> dict[str, Metric]:
    settings = classifier.settings
    metrics = accuracies(rankings, classifier.labels, classifier.num_classes, settings.primary_metric)
    for per_class in settings.few_shot:
        metrics[f"top1_few_shot_{per_class}"] = classifier.few_shot(per_class)
    if accepted is not None:
        counted = [accepted[place] for place in classifier.queries.indices.tolist()]
        metrics["top1_real"] = real_accuracy(rankings[settings.primary_metric], counted)
    return metrics


def _clamped(classifier: Classifier) -> tuple[str, ...]:
    return tuple(
        f"k = {k} is more than the {classifier.available} images of the bank; all of them voted"
        for k in sorted(set(classifier.settings.k))
        if k > classifier.available
    )


def _resolved(classifier: Classifier, how: Extraction) -> dict[str, Any]:
    width = classifier.queries.features.shape[1]
    return {**resolved(how, classifier.settings.head), "width": width, "ranks": classifier.group.world}


def _data_used(sets: Sets, bank: Stored, asked: Stored) -> tuple[DataUsed, ...]:
    used = [("bank", sets.bank, bank)]
    if sets.query is not None:
        used.append(("query", sets.query, asked))
    return tuple(
        DataUsed(
            role=role,
            name=source.name,
            fingerprint=source.fingerprint,
            count=len(kept.indices()),
            num_classes=len(source.classes),
            skipped=kept.skipped(),
        )
        for role, source, kept in used
    )

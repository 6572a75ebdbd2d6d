"""Zero-shot scoring of images against texts through a CLIP teacher's text tower, without training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from evals.core.accuracy import class_table, confusion_table, mean_class, top_accuracies
from evals.core.evaluator import domain_notes, machine_settings
from evals.core.features import Bank, Extraction, Stored, check_finite, extract
from evals.core.plan import make_extraction, resolved, to_teacher_space
from evals.core.report import DataUsed, Metric, Report, Table, file_name, proportion, write
from radio.chunks import Damage, default_cache
from radio.config import to_plain
from radio.data import ImageSource, open_source
from radio.dist import Group, current
from radio.errors import ConfigError, require
from radio.progress import ProgressFactory, no_progress
from radio.provenance import commit, describe_device, peak_memory, versions
from radio.types import Backbone

from .captions import Captioned, open_captions
from .classifier import TextCache, classifier, text_vectors
from .names import Named, name_classes, read_templates
from .ranking import Ranking, image_to_text, rank_classes, text_to_image
from .settings import ZeroshotSettings
from .towers import TextHead, find_text_tower

# Letters: N images, C summary width, E text width, K classes.

_RECALLS = (1, 5, 10)


@final
@dataclass(frozen=True, slots=True)
class _Job:
    """Inputs of both kinds of scoring."""

    model: Backbone
    settings: ZeroshotSettings
    side: TextHead
    how: Extraction
    cache: Path
    group: Group
    watch: ProgressFactory
    damage: Damage

    @property
    def texts(self) -> TextCache:
        """Cache of the vectors of texts."""
        return TextCache(
            folder=self.cache,
            device=self.how.device,
            group=self.group,
            watch=self.watch,
            damage=self.damage,
        )

    def images(self, source: ImageSource) -> tuple[Stored, Bank]:
        """Extract the features of a source; return them as stored, and projected into the texts' space."""
        stored = extract(
            self.model,
            source,
            self.how,
            cache=self.cache,
            group=self.group,
            watch=self.watch,
            damage=self.damage,
        )
        features, indices = stored.load()
        projected = self.side.tower.project(to_teacher_space(self.model, self.side.head, features))
        check_finite(projected, f"{self.model.name} in the space of {self.side.teacher}'s texts")
        return stored, Bank(projected, indices)


@final
@dataclass(frozen=True, slots=True)
class _Scored:
    """The part of the report that depends on the kind of scoring."""

    primary_metric: str
    metrics: dict[str, Metric]
    tables: dict[str, Table]
    data: tuple[DataUsed, ...]
    source: ImageSource
    found: dict[str, object]  # further resolved settings
    records: Iterable[str]
    notes: tuple[str, ...] = ()


@final
class ZeroshotEvaluator:
    """Scores any backbone whose summary lies in, or can be mapped to, the space of a text tower."""

    name = "zeroshot"
    settings = ZeroshotSettings

    def missing_requirements(self, model: Backbone) -> str:
        """Explain why the model has no text tower; empty if it has one."""
        try:
            find_text_tower(model)
        except ConfigError as error:
            return str(error)
        return ""

    def run(
        self,
        model: Backbone,
        settings: ZeroshotSettings,
        out: Path,
        *,
        name: str | None = None,
        watch: ProgressFactory = no_progress,
        group: Group | None = None,
    ) -> Report:
        """Score `model` and write `zeroshot-NAME.json` and `zeroshot-NAME.jsonl` into `out`.

        The second has a line per image, and in retrieval a line per caption, too. Retrieval adds `-retrieval`
        to the name. Every rank of a torchrun job calls this and gets the same report; rank 0 writes.

        Raises:
            ConfigError: the model has no text tower, or an unknown device.
            CheckpointError: the text tower's weights are not at the path in the checkpoint.
            DataError: data that are absent, damaged, or whose classes have no names.
            RadioError: a name or caption that the text tower cannot encode.
            MissingExtraError: open_clip is not installed.
        """
        require("open_clip", extra="zeroshot")  # raises here rather than after the extraction
        started = time.monotonic()
        side = find_text_tower(model, settings.text)
        how, notes = make_extraction(model, settings, side.head)
        job = _Job(
            model=model,
            settings=settings,
            side=side,
            how=how,
            cache=settings.cache or default_cache(),
            group=group or current(),
            watch=watch,
            damage=Damage(),
        )
        scored = _classification(job) if settings.captions is None else _retrieval(job)
        label = (name or model.name) + ("" if settings.captions is None else "-retrieval")
        base = file_name(self.name, label)
        report = Report(
            task=self.name,
            model=label,
            fingerprint=model.fingerprint,
            primary_metric=scored.primary_metric,
            metrics=scored.metrics,
            settings={
                **to_plain(settings),
                "resolved": {
                    **resolved(how, side.head),
                    "text": side.teacher,
                    "ranks": job.group.world,
                    **scored.found,
                },
            },
            data=scored.data,
            device=describe_device(how.device),
            seconds={"total": time.monotonic() - started},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            machine_settings=machine_settings(settings),
            versions=versions(),
            git=commit(),
            metadata=dict(model.metadata),
            peak_memory=peak_memory(how.device),
            notes=(
                *notes,
                *scored.notes,
                *scored.source.notes,
                *job.damage.notes(job.group),
                *domain_notes(model, [scored.source]),
            ),
            tables=scored.tables,
            files=(f"{base}.jsonl",),
        )
        if job.group.leads:
            write(report, out / f"{base}.json", {out / f"{base}.jsonl": "".join(scored.records)})
        return report


def _classification(job: _Job) -> _Scored:
    settings = job.settings
    source = open_source(
        settings.query or "scenes:val",
        limit=settings.limit,
        scenes=settings.scenes,
        seed=settings.seed,
        memo=job.cache / "fingerprints",
        watch=job.watch,
    )
    named = name_classes(source, settings.class_names)
    templates = read_templates(settings.templates, scenes=source.name.startswith("scenes:"))
    columns = classifier(job.side.tower, named.names, templates, cache=job.texts)
    stored, images = job.images(source)
    ranking = rank_classes(images.features, columns)
    labels = torch.from_numpy(named.labels)[images.indices]
    metrics = top_accuracies(ranking.classes, labels, len(named.names))
    return _Scored(
        primary_metric="top1",
        metrics={**metrics, "mean_class": mean_class(ranking.classes, labels)},
        tables={
            "classes": class_table(ranking.classes, labels, named.names),
            "confusions": confusion_table(ranking.classes, labels, named.names),
        },
        data=(_used("query", source, stored, len(named.names)),),
        source=source,
        found={"templates": len(templates), "chance": 100 / len(named.names)},
        notes=named.notes,
        records=_class_records(source, images.indices, named, ranking, labels),
    )


def _retrieval(job: _Job) -> _Scored:
    settings = job.settings
    assert settings.captions is not None, "the caller has looked"
    captioned = open_captions(
        settings.captions,
        settings.images,
        limit=settings.limit,
        scenes=settings.scenes,
        seed=settings.seed,
        memo=job.cache / "fingerprints",
    )
    texts = text_vectors(job.side.tower, captioned.texts, cache=job.texts)
    stored, images = job.images(captioned.source)
    kept, owners = _readable(captioned, images.indices)
    to_text = image_to_text(images.features, texts[kept], owners)
    to_image = text_to_image(images.features, texts[kept], owners)
    metrics = {f"image_to_text_r{k}": _recall(to_text, k) for k in _RECALLS}
    metrics |= {f"text_to_image_r{k}": _recall(to_image, k) for k in _RECALLS}
    said = [captioned.texts[place] for place in kept.tolist()]
    return _Scored(
        primary_metric="image_to_text_r1",
        metrics=metrics,
        tables={},
        data=(_used("images", captioned.source, stored, 0),),
        source=captioned.source,
        found={"captions": len(said)},
        records=_retrieval_records(captioned.source, images.indices, to_text, said, owners, to_image),
    )


def _readable(captioned: Captioned, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Select the captions of the readable images; return their indices, and the rows of their images."""
    rows = torch.full((len(captioned.source.keys),), -1)
    rows[indices] = torch.arange(len(indices))
    owners = rows[captioned.owners]
    kept = (owners >= 0).nonzero().flatten()
    return kept, owners[kept]


def _recall(before: Tensor, k: int) -> Metric:
    return proportion(int((before < k).sum()), len(before))


def _used(role: str, source: ImageSource, stored: Stored, num_classes: int) -> DataUsed:
    return DataUsed(
        role=role,
        name=source.name,
        fingerprint=source.fingerprint,
        count=len(stored.indices()),
        num_classes=num_classes,
        skipped=stored.skipped(),
    )


def _class_records(
    source: ImageSource, indices: Tensor, named: Named, ranking: Ranking, labels: Tensor
) -> Iterator[str]:
    """Yield one JSON line per image: its class, the five best, and their logits (100 times the cosine)."""
    for row, place in enumerate(indices.tolist()):
        classes = [label for label in ranking.classes[row].tolist() if label >= 0]
        record = {
            "key": source.keys[place],
            "label": named.names[int(labels[row])],
            "predictions": [named.names[label] for label in classes],
            "logits": [round(100 * value, 4) for value in ranking.cosines[row, : len(classes)].tolist()],
            "correct": classes[0] == int(labels[row]),
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _retrieval_records(
    source: ImageSource,
    indices: Tensor,
    to_text: Tensor,
    texts: list[str],
    owners: Tensor,
    to_image: Tensor,
) -> Iterator[str]:
    """Yield one JSON line per image, then one per caption, with ranks from 1."""
    for place, before in zip(indices.tolist(), to_text.tolist(), strict=True):
        yield json.dumps({"key": source.keys[place], "rank": before + 1}, ensure_ascii=False) + "\n"
    keys = [source.keys[place] for place in indices.tolist()]
    for text, owner, before in zip(texts, owners.tolist(), to_image.tolist(), strict=True):
        record = {"caption": text, "image": keys[owner], "rank": before + 1}
        yield json.dumps(record, ensure_ascii=False) + "\n"

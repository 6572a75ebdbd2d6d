"""Zero-shot: pictures against the words of a CLIP teacher's text tower, without training anything."""

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
from evals.core.chunks import Damage
from evals.core.data import ImageSource, open_source
from evals.core.dist import Group, current
from evals.core.evaluator import Watch, card_of, domain_notes, machine_settings, silent
from evals.core.features import Bank, Extraction, Stored, check_finite, default_cache, extract
from evals.core.plan import carry, plan, resolved
from evals.core.provenance import commit, describe_device, peak_memory, versions
from evals.core.report import DataUsed, Metric, Report, Table, file_name, proportion, write
from radio.config import to_plain
from radio.errors import ConfigError, require
from radio.types import Backbone

from .captions import Captioned, open_captions
from .classifier import TextCache, classifier, text_vectors
from .names import Named, name_classes, read_templates
from .ranking import Ranking, picture_to_text, rank_classes, text_to_picture
from .settings import ZeroshotSettings
from .towers import Side, text_side

# Letters: N pictures, C summary width, E text width, K classes.

_RECALLS = (1, 5, 10)


@final
@dataclass(frozen=True, slots=True)
class _Job:
    """What both kinds of scoring need."""

    model: Backbone
    settings: ZeroshotSettings
    side: Side
    how: Extraction
    cache: Path
    group: Group
    watch: Watch
    damage: Damage

    @property
    def texts(self) -> TextCache:
        """Where vectors of texts are kept."""
        return TextCache(
            folder=self.cache,
            device=self.how.device,
            group=self.group,
            watch=self.watch,
            damage=self.damage,
        )

    def pictures(self, source: ImageSource) -> tuple[Stored, Bank]:
        """The features of a source on disk, and all of them in the space of the texts."""
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
        projected = self.side.tower.project(carry(self.model, self.side.head, features))
        check_finite(projected, f"{self.model.name} in the space of {self.side.teacher}'s texts")
        return stored, Bank(projected, indices)


@final
@dataclass(frozen=True, slots=True)
class _Scored:
    """What a kind of scoring adds to the report."""

    headline: str
    metrics: dict[str, Metric]
    tables: dict[str, Table]
    data: tuple[DataUsed, ...]
    source: ImageSource
    found: dict[str, object]  # resolved settings of its own
    records: Iterable[str]
    notes: tuple[str, ...] = ()


@final
class ZeroshotEvaluator:
    """Scores any backbone whose summary lies, or can be carried, into the space of a text tower."""

    name = "zeroshot"
    settings = ZeroshotSettings

    def lacks(self, model: Backbone) -> str:
        """What it lacks, in words, where there is no text tower to read it with."""
        try:
            text_side(model)
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
        watch: Watch = silent,
        group: Group | None = None,
    ) -> Report:
        """Score `model`; writes `zeroshot-NAME.json` and `zeroshot-NAME.jsonl` (a line a picture) into `out`.

        Retrieval adds `-retrieval` to the name. Every rank of a torchrun job calls this and gets the same
        report; rank 0 writes.

        Raises:
            ConfigError: the model has no text tower, or an unknown device.
            CheckpointError: the text tower's weights are not where the checkpoint says.
            DataError: data that are absent, damaged, or whose classes have no names.
            RadioError: a name or caption that the text tower cannot read.
            MissingExtraError: open_clip is not installed.
        """
        require("open_clip", extra="zeroshot")  # its absence shows before the long part
        started = time.monotonic()
        side = text_side(model, settings.text)
        how, notes = plan(model, settings, side.head)
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
            headline=scored.headline,
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
            card=card_of(model),
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
    stored, pictures = job.pictures(source)
    ranking = rank_classes(pictures.features, columns)
    labels = torch.from_numpy(named.labels)[pictures.indices]
    metrics = top_accuracies(ranking.classes, labels, len(named.names))
    return _Scored(
        headline="top1",
        metrics={**metrics, "mean_class": mean_class(ranking.classes, labels)},
        tables={
            "classes": class_table(ranking.classes, labels, named.names),
            "confusions": confusion_table(ranking.classes, labels, named.names),
        },
        data=(_used("query", source, stored, len(named.names)),),
        source=source,
        found={"templates": len(templates), "chance": 100 / len(named.names)},
        notes=named.notes,
        records=_class_records(source, pictures.indices, named, ranking, labels),
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
    stored, pictures = job.pictures(captioned.source)
    kept, owners = _readable(captioned, pictures.indices)
    to_text = picture_to_text(pictures.features, texts[kept], owners)
    to_picture = text_to_picture(pictures.features, texts[kept], owners)
    metrics = {f"image_to_text_r{k}": _recall(to_text, k) for k in _RECALLS}
    metrics |= {f"text_to_image_r{k}": _recall(to_picture, k) for k in _RECALLS}
    said = [captioned.texts[place] for place in kept.tolist()]
    return _Scored(
        headline="image_to_text_r1",
        metrics=metrics,
        tables={},
        data=(_used("pictures", captioned.source, stored, 0),),
        source=captioned.source,
        found={"captions": len(said)},
        records=_retrieval_records(captioned.source, pictures.indices, to_text, said, owners, to_picture),
    )


def _readable(captioned: Captioned, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The captions of the pictures that could be read, and each one's row among those pictures."""
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
    """One JSON line a picture: its class, the five best, and their logits, 100 times the cosine."""
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
    to_picture: Tensor,
) -> Iterator[str]:
    """One JSON line a picture, then one a caption, with the ranks from 1."""
    for place, before in zip(indices.tolist(), to_text.tolist(), strict=True):
        yield json.dumps({"key": source.keys[place], "rank": before + 1}, ensure_ascii=False) + "\n"
    keys = [source.keys[place] for place in indices.tolist()]
    for text, owner, before in zip(texts, owners.tolist(), to_picture.tolist(), strict=True):
        record = {"caption": text, "picture": keys[owner], "rank": before + 1}
        yield json.dumps(record, ensure_ascii=False) + "\n"

"""The student with SAM's own decoder (paper, section 5.3 and table 8), scored on COCO instances."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

from evals.core.evaluator import domain_notes, machine_settings
from evals.core.report import DataUsed, Metric, Report, Table, file_name, write
from radio.chunks import Damage, DamagedError, default_cache
from radio.config import to_plain
from radio.dist import Group, current
from radio.errors import ConfigError, require
from radio.io import staged
from radio.progress import ProgressFactory, no_progress
from radio.provenance import (
    choose_device,
    commit,
    describe_device,
    peak_memory,
    versions,
)
from radio.scenes.layouts import CARD_VERSION, ScenesSettings, write_cached
from radio.types import Backbone

from .coco import Instances, open_instances
from .decoding import prompts_together, score
from .detections import Detections, average_precision, encode
from .encoder import DropIn, make_drop_in
from .panels import write_panels
from .scoring import Record, category_table, metrics
from .settings import SamSettings
from .work import Done, Work


class _Scored(NamedTuple):
    """The part of the report that depends on the kind of scoring."""

    primary_metric: str
    metrics: dict[str, Metric]
    tables: dict[str, Table]
    notes: tuple[str, ...]
    records: list[dict[str, Any]]
    panels: tuple[str, ...] = ()


@final
class SamEvaluator:
    """Scores the masks of SAM's decoder on any student of a SAM, or on a SAM's own encoder."""

    name = "sam"
    settings = SamSettings

    def missing_requirements(self, model: Backbone) -> str:
        """Describe what the model lacks if it is neither a SAM nor distilled from one; empty if nothing."""
        try:
            drop_in = make_drop_in(model, None, None, 0)
        except ConfigError as error:
            return str(error)
        return drop_in.notes[0] if drop_in.is_untrained else ""

    def run(
        self,
        model: Backbone,
        settings: SamSettings,
        out: Path,
        *,
        name: str | None = None,
        watch: ProgressFactory = no_progress,
        group: Group | None = None,
    ) -> Report:
        """Score `model`; write `sam-NAME.json` and `sam-NAME.jsonl` (one line per instance) into `out`.

        Prompts other than boxes add a suffix to the name. Every rank of a torchrun job calls this and gets
        the same report; rank 0 writes.

        Raises:
            ConfigError: a model that was not distilled from a SAM, or an unknown device.
            CheckpointError: SAM's weights are not at the path in the checkpoint.
            SizeError: a size or window that does not fit; names the nearest that does.
            DataError: data that are missing, damaged, or contain nothing to score.
            MissingExtraError: segment-anything, pycocotools or scipy is not installed.
        """
        for module in ("segment_anything", "pycocotools", "scipy"):  # fail early
            require(module, extra="sam")
        started = time.monotonic()
        group, cache = group or current(), settings.cache or default_cache()
        device = choose_device(settings.device)
        drop_in = make_drop_in(model, settings.sam_checkpoint, settings.size, settings.seed, settings.teacher)
        prompt_batch = settings.box_batch or prompts_together(drop_in.head, device)
        damage = Damage()
        data = _open(settings, cache, group, damage)
        label = (name or model.name) + _suffix(settings)
        base = file_name(self.name, label)
        with staged(out) as fresh:
            if settings.detections is not None:
                found = Detections(settings.detections, data)
                encoding = partial(_judge_detections, drop_in, prompt_batch)
                work = Work(found, encoding, drop_in, settings, device, cache, prompt_batch, damage)
                done = work.run(group, watch)
                scored = _precision(found, done)
            else:
                judge = partial(_judge, drop_in, prompt_batch, settings.union_bias)
                work = Work(data, judge, drop_in, settings, device, cache, prompt_batch, damage)
                done = work.run(group, watch)
                scored = _overlaps(data, done, settings)
                if settings.save_masks and group.leads:
                    records = [Record(*record) for chunk in done for record in chunk.records]
                    panels = write_panels(work, data, records, fresh / base, watch)
                    scored = scored._replace(panels=tuple(f"{base}/{panel}" for panel in panels))
            report = Report(
                task=self.name,
                model=label,
                fingerprint=model.fingerprint,
                primary_metric=scored.primary_metric,
                metrics={**scored.metrics, **_rates(done)},
                settings={**to_plain(settings), "resolved": _resolved(work, data, group)},
                data=(_used(data),),
                device=describe_device(device),
                seconds={"total": time.monotonic() - started},
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                versions=versions(),
                git=commit(),
                metadata=dict(model.metadata),
                machine_settings=machine_settings(settings),
                peak_memory=peak_memory(device),
                notes=(
                    *drop_in.notes,
                    *scored.notes,
                    *data.notes,
                    *damage.notes(group),
                    *domain_notes(model, [data.files]),
                ),
                tables=scored.tables,
                files=(f"{base}.jsonl", *scored.panels),
            )
            if group.leads:
                lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in scored.records)
                write(report, fresh / f"{base}.json", {fresh / f"{base}.jsonl": "".join(lines)})
        return report


def _open(settings: SamSettings, cache: Path, group: Group, damage: Damage) -> Instances:
    file, images, name, location = settings.data, settings.images, None, None
    if file is None or images is None:
        root = cache / "scenes" / f"coco-v{CARD_VERSION}-{settings.scenes}-seed{settings.seed}"
        world = ScenesSettings(layout="coco", count=1, val_count=settings.scenes, seed=settings.seed)
        group.on_leader(lambda: write_cached(root, world, lambda reason: damage.add(DamagedError(reason))))
        file, images = root / "annotations" / "instances_val.json", root / "val"
        name, location = "scenes:val", f"scenes:val?seed={settings.seed}"
    return open_instances(
        file,
        images,
        limit=settings.limit,
        crowds=settings.crowds,
        smallest_area=settings.smallest_area,
        memo=cache / "fingerprints",
        empty=settings.detections is not None,
        name=name,
        location=location,
    )


def _suffix(settings: SamSettings) -> str:
    if settings.detections is not None:
        return "-detections"
    return f"-{settings.clicks}-clicks" if settings.prompts == "points" else ""


def _judge(drop_in: DropIn, prompt_batch: int, bias: float, loaded: Any, predictions: Any) -> list[Record]:
    return score(drop_in.head, loaded, predictions, prompt_batch, bias)


def _judge_detections(
    drop_in: DropIn, prompt_batch: int, loaded: Any, predictions: Any
) -> list[tuple[Any, ...]]:
    return list(encode(drop_in.head, loaded, predictions, prompt_batch))


def _overlaps(data: Instances, done: Sequence[Done], settings: SamSettings) -> _Scored:
    records = [Record(*record) for chunk in done for record in chunk.records]
    found = metrics(records, settings.seed)
    crowds = sum(record.crowd for record in records)
    notes = [f"{len(records)} annotations on {len(data.images)} images, {crowds} of them crowds"]
    if settings.prompts == "boxes":
        notes.append(
            f"a box alone goes a long way: the prompt taken as the mask has an mIoU of "
            f"{found['filled_box_miou'].value:.1f}"
        )
    lines = [{**record._asdict(), "image": name} for record, name in zip(records, _names(data), strict=True)]
    return _Scored(
        "miou", found, {"categories": category_table(records, data.categories)}, tuple(notes), lines
    )


def _names(data: Instances) -> list[str]:
    """List the image name of each annotation, in the order of the records."""
    return [image.name for image in data.images for _ in image.instances]


def _precision(found: Detections, done: Sequence[Done]) -> _Scored:
    records = [record for chunk in done for record in chunk.records]
    lines = [
        {"image_id": image, "entry": entry, "quality": quality, "size": list(size), "counts": counts}
        for image, entry, counts, size, quality in records
    ]
    note = f"{len(records)} detections on {len(found.images)} of {len(found.truth.images)} images"
    return _Scored("ap", average_precision(found, records), {}, (note, *found.notes), lines)


def _rates(done: Sequence[Done]) -> dict[str, Metric]:
    """Compute the images/s of encoder and decoder, without the first chunk (warm-up) if there are more."""
    rates = {}
    for part in ("encoder", "decoder"):
        laps = [(chunk.images, seconds) for chunk in done if (seconds := getattr(chunk, part)) is not None]
        kept = laps[1:] or laps
        if kept:
            rate = sum(images for images, _ in kept) / sum(seconds for _, seconds in kept)
            rates[f"{part}_rate"] = Metric(value=rate, unit="images/s")
    return rates


def _resolved(work: Work, data: Instances, group: Group) -> dict[str, Any]:
    head = work.drop_in.head
    return {
        "size": work.drop_in.side,
        "dtype": work.numbers.removeprefix("torch."),
        "decoder": head.name,
        "frame": head.side,
        "box_batch": work.box_batch,
        "annotations": data.count,
        "ranks": group.world,
    }


def _used(data: Instances) -> DataUsed:
    return DataUsed(
        role="images",
        name=data.name,
        fingerprint=data.fingerprint,
        count=len(data.images),
        num_classes=len(data.categories),
    )
